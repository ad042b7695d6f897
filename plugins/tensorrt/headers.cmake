# Where TensorRT's public headers are: the target mgvq_tensorrt_headers if they are anywhere, and MGVQ_TENSORRT_VERSION.
#
#     TENSORRT_INCLUDE_DIR             the folder with NvInferRuntime.h; must be right if it is given
#     MGVQ_FETCH_TENSORRT_HEADERS      a tag of NVIDIA/TensorRT such as v10.3.0: fetched when configuring (needs the internet)
#     otherwise                        where JetPack, the Debian packages and the archives install them
#
# Nothing of TensorRT is linked: a plugin library calls nothing, TensorRT calls it.
include_guard(GLOBAL)

set(TENSORRT_INCLUDE_DIR "" CACHE PATH "Folder with TensorRT's NvInferRuntime.h, for the plugin")
set(MGVQ_FETCH_TENSORRT_HEADERS "" CACHE STRING "Tag of NVIDIA/TensorRT to fetch the headers of, such as v10.3.0")
set(MGVQ_TENSORRT_INCLUDE "")

if(TENSORRT_INCLUDE_DIR)
  if(NOT EXISTS "${TENSORRT_INCLUDE_DIR}/NvInferRuntime.h")
    message(FATAL_ERROR "TENSORRT_INCLUDE_DIR: expected NvInferRuntime.h in ${TENSORRT_INCLUDE_DIR}, found none; "
      "name the include folder of TensorRT 10.3 or newer")
  endif()
  set(MGVQ_TENSORRT_INCLUDE "${TENSORRT_INCLUDE_DIR}")
elseif(MGVQ_FETCH_TENSORRT_HEADERS)
  include(FetchContent)
  # SOURCE_SUBDIR names a folder that is not there: the headers are wanted, TensorRT's own build is not.
  FetchContent_Declare(mgvq_tensorrt
    GIT_REPOSITORY https://github.com/NVIDIA/TensorRT.git GIT_TAG ${MGVQ_FETCH_TENSORRT_HEADERS}
    GIT_SHALLOW TRUE GIT_SUBMODULES "" SOURCE_SUBDIR headers-only)
  FetchContent_MakeAvailable(mgvq_tensorrt)
  set(MGVQ_TENSORRT_INCLUDE "${mgvq_tensorrt_SOURCE_DIR}/include")
else()
  find_path(MGVQ_FOUND_TENSORRT NvInferRuntime.h
    PATHS /usr/local/tensorrt /opt/tensorrt /usr/src/tensorrt
    PATH_SUFFIXES include ${CMAKE_LIBRARY_ARCHITECTURE})
  if(MGVQ_FOUND_TENSORRT)
    set(MGVQ_TENSORRT_INCLUDE "${MGVQ_FOUND_TENSORRT}")
  endif()
endif()

if(MGVQ_TENSORRT_INCLUDE)
  # The macros are numbers in some versions and names of numbers in others.
  file(STRINGS "${MGVQ_TENSORRT_INCLUDE}/NvInferVersion.h" lines
    REGEX "define (NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)? +[0-9]+")
  string(REGEX REPLACE ".*_MAJOR[A-Z_]* +([0-9]+).*" "\\1" major "${lines}")
  string(REGEX REPLACE ".*_MINOR[A-Z_]* +([0-9]+).*" "\\1" minor "${lines}")
  set(MGVQ_TENSORRT_VERSION "${major}.${minor}")
  if(MGVQ_TENSORRT_VERSION VERSION_LESS 10.3)
    message(FATAL_ERROR "TensorRT: expected headers of 10.3 or newer, found ${MGVQ_TENSORRT_VERSION} in "
      "${MGVQ_TENSORRT_INCLUDE}; name others with -DTENSORRT_INCLUDE_DIR")
  endif()
  add_library(mgvq_tensorrt_headers INTERFACE)
  target_include_directories(mgvq_tensorrt_headers SYSTEM INTERFACE "${MGVQ_TENSORRT_INCLUDE}")
endif()
