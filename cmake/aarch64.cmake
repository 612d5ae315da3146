# Toolchain: builds for 64-bit Arm with Debian's cross compiler; the tests run in qemu's emulation of that machine's programs.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# A CPU without instructions for bf16, which would be left to torch.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -cpu cortex-a72)
# No libraries to find at run time: the emulator need not know where they lie.
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
