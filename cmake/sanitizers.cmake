# sanitize(TARGET address|thread): TARGET, and what links to it, with AddressSanitizer and UndefinedBehaviorSanitizer, or with
# ThreadSanitizer. SANITIZERS are those that there are: none for another machine.
if(NOT CMAKE_CROSSCOMPILING)
  set(SANITIZERS address thread)
endif()

function(sanitize target sanitizer)
  set(options -fsanitize=${sanitizer})
  if(sanitizer STREQUAL address)
    list(APPEND options -fsanitize=undefined -fno-sanitize-recover=all)
  endif()
  target_compile_options(${target} PUBLIC -O1 -g ${options})
  target_link_options(${target} PUBLIC ${options})
endfunction()
