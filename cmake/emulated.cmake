# The vector kernels for any x86-64: their intrinsics in plain C++ by SIMDe (Debian: libsimde-dev), so that the C++ tests run
# every path on every machine. Sets EMULATED_SOURCE_DIR, a copy of csrc and tests/cpp without the pragmas that allow the
# compiler AVX2 and AVX512, and adds qlora_cpu_emulated; sets nothing where that cannot be.
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  return()
endif()
find_path(SIMDE_INCLUDE_DIR simde/x86/avx512/dpbf16.h)  # which 0.7 lacks
if(NOT SIMDE_INCLUDE_DIR)
  message(STATUS "No SIMDe 0.8 (libsimde-dev): the C++ tests run only the paths that this CPU has")
  return()
endif()

set(EMULATED_SOURCE_DIR ${CMAKE_BINARY_DIR}/emulated)
file(GLOB_RECURSE EMULATED_NAMES RELATIVE ${CMAKE_SOURCE_DIR} CONFIGURE_DEPENDS
  csrc/*.h csrc/cpu/*.cpp tests/cpp/*.h tests/cpp/*.cpp)
foreach(name ${EMULATED_NAMES})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${name})
  file(READ ${name} content)
  string(REGEX REPLACE "#pragma GCC (push_options|pop_options|target)[^\n]*" "" content "${content}")
  # Written only if it changes. Errors name the original.
  file(CONFIGURE OUTPUT ${EMULATED_SOURCE_DIR}/${name} CONTENT "#line 1 \"${CMAKE_SOURCE_DIR}/${name}\"\n${content}" @ONLY)
endforeach()

file(GLOB EMULATED_SOURCES CONFIGURE_DEPENDS csrc/cpu/*.cpp)
list(TRANSFORM EMULATED_SOURCES REPLACE ${CMAKE_SOURCE_DIR} ${EMULATED_SOURCE_DIR})
add_library(qlora_cpu_emulated STATIC ${EMULATED_SOURCES})
target_include_directories(qlora_cpu_emulated PUBLIC ${EMULATED_SOURCE_DIR}/csrc)
target_include_directories(qlora_cpu_emulated SYSTEM PUBLIC tests/cpp/emulated ${SIMDE_INCLUDE_DIR})
target_compile_definitions(qlora_cpu_emulated PUBLIC QLORA_EXT_EMULATED)
# SSE2 and no more, whatever CXXFLAGS says: the compiler's own intrinsics beyond it would clash with SIMDe's. psabi: that wide
# vectors are passed otherwise than with AVX concerns no one here. O1: at O3 one file takes GCC minutes, not seconds.
target_compile_options(qlora_cpu_emulated PUBLIC ${QLORA_CPU_OPTIONS} -O1 -march=x86-64 -mno-sse3 -Wno-psabi)
