# cmake -P: which architectures each CUDA release is asked for.
cmake_minimum_required(VERSION 3.20)
include("${CMAKE_CURRENT_LIST_DIR}/../../plugins/cmake/architectures.cmake")

function(expect version wanted)
  mgvq_supported_architectures(${version} found)
  if(NOT found STREQUAL wanted)
    message(FATAL_ERROR "CUDA ${version}: expected ${wanted}, found ${found}")
  endif()
endfunction()

expect(12.6 "80-real;86-real;87-real;89-real;90a-real;90-virtual")
expect(12.8 "80-real;86-real;87-real;89-real;90a-real;101-real;120")
expect(13.0 "80-real;86-real;87-real;89-real;90a-real;110-real;120")
expect(13.2 "80-real;86-real;87-real;89-real;90a-real;110-real;120")
