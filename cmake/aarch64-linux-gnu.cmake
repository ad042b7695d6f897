# Cross-compiling for a Jetson on x86-64 Linux. Use it through the presets aarch64-orin and aarch64-thor.
#
# Needs, besides nvcc for this machine:
#     g++-aarch64-linux-gnu                               the compiler (Debian, Ubuntu)
#     cuda-cross-aarch64-12-6  (JetPack 6, sm_87)         CUDA's headers and static runtime for the board, from NVIDIA's
#     cuda-cross-sbsa-13-0     (JetPack 7, sm_110)        "cross-linux" repository; they add targets/ to the toolkit
#
#     MGVQ_CUDA_TARGET    folder under the toolkit's targets/: aarch64-linux before CUDA 13 on Jetson, sbsa-linux since
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(MGVQ_CUDA_TARGET aarch64-linux CACHE STRING "Folder under the CUDA toolkit's targets/")
set(CMAKE_CUDA_FLAGS_INIT "-target-dir ${MGVQ_CUDA_TARGET}")
# try_compile configures anew, and must know the folder too.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES MGVQ_CUDA_TARGET)

# Programs run here; headers and libraries are the board's.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
