# Decides whether the CUDA kernels are built, and for which architectures. Include it in the highest directory that links
# CUDA code. Sets MGVQ_CUDA; enables the language where it is ON.
#
#     MGVQ_BUILD_CUDA            AUTO (default): if an nvcc is found. ON: it must be found. OFF: host parts only.
#     CMAKE_CUDA_ARCHITECTURES   default: all of architectures.cmake that the CUDA release found can compile
#     CMAKE_CUDA_COMPILER        or the environment's CUDACXX or CUDA_HOME, else nvcc on PATH or in /usr/local/cuda
include_guard(GLOBAL)
include("${CMAKE_CURRENT_LIST_DIR}/architectures.cmake")

set(MGVQ_BUILD_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE MGVQ_BUILD_CUDA PROPERTY STRINGS AUTO ON OFF)
set(MGVQ_CUDA OFF)
set(MGVQ_NVCC "")

if(MGVQ_BUILD_CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(MGVQ_NVCC "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(MGVQ_NVCC "$ENV{CUDACXX}")
  else()
    find_program(MGVQ_FOUND_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" PATHS /usr/local/cuda/bin)
    if(MGVQ_FOUND_NVCC)
      set(MGVQ_NVCC "${MGVQ_FOUND_NVCC}")
    endif()
  endif()
endif()

if(MGVQ_NVCC)
  execute_process(COMMAND "${MGVQ_NVCC}" --version OUTPUT_VARIABLE MGVQ_NVCC_SAYS RESULT_VARIABLE MGVQ_NVCC_FAILED ERROR_QUIET)
  if(NOT MGVQ_NVCC_FAILED AND MGVQ_NVCC_SAYS MATCHES "release ([0-9]+\\.[0-9]+)")
    set(MGVQ_CUDA_VERSION ${CMAKE_MATCH_1})
    if(MGVQ_CUDA_VERSION VERSION_LESS 12.6)
      message(FATAL_ERROR "CUDA: expected 12.6 or newer, found ${MGVQ_CUDA_VERSION} (${MGVQ_NVCC}); "
        "install a newer toolkit, or configure with -DMGVQ_BUILD_CUDA=OFF for the host parts")
    endif()
    # Set before the language is enabled: older CMake tries the compiler with architectures that CUDA 13 dropped.
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
      mgvq_supported_architectures(${MGVQ_CUDA_VERSION} MGVQ_SUPPORTED)
      set(CMAKE_CUDA_ARCHITECTURES "${MGVQ_SUPPORTED}" CACHE STRING "Architectures to compile the kernels for")
    endif()
    set(CMAKE_CUDA_COMPILER "${MGVQ_NVCC}" CACHE FILEPATH "nvcc")
    enable_language(CUDA)
    set(MGVQ_CUDA ON)
  endif()
endif()

if(MGVQ_CUDA)
  message(STATUS "mgvq kernels: CUDA ${MGVQ_CUDA_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
elseif(MGVQ_BUILD_CUDA STREQUAL "ON")
  message(FATAL_ERROR "MGVQ_BUILD_CUDA=ON: expected an nvcc of CUDA 12.6 or newer on PATH, in CUDACXX or in CMAKE_CUDA_COMPILER, "
    "found ${MGVQ_NVCC} (none if empty)")
else()
  message(STATUS "mgvq kernels: not built, no nvcc (MGVQ_BUILD_CUDA=${MGVQ_BUILD_CUDA}); the reference and host tests are")
endif()
