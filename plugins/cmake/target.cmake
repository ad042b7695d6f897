# What every target of ours is compiled with.
#     mgvq_target(name)
# C++17 without extensions, warnings, position-independent, symbols hidden unless marked; `vq_linear/...` can be included.
include_guard(GLOBAL)

get_filename_component(MGVQ_PLUGINS_FOLDER "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE CACHE)

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "How to compile; Release unless told otherwise" FORCE)
endif()

function(mgvq_target name)
  set_target_properties(${name} PROPERTIES
    CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
    POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  target_include_directories(${name} PUBLIC "${MGVQ_PLUGINS_FOLDER}")
  # No contraction of a·b + c: the reference's float32 sums are the same bits on every processor.
  target_compile_options(${name} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -ffp-contract=off>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
endfunction()
