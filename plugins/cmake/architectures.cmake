# The compute capabilities the kernels are compiled for. Also a script: tests/plugins/architectures_check.cmake.
include_guard(GLOBAL)

# 87 and 110 are the boards' (targets/*.toml; a Python test compares), the others are workstations and servers.
set(MGVQ_ARCHITECTURES 80 86 87 89 90a 110 120)

# The list for CMAKE_CUDA_ARCHITECTURES that a CUDA release can compile: machine code for each that it knows, and PTX of the
# newest, for GPUs that come after it.
#     mgvq_supported_architectures(<major.minor> <variable>)
function(mgvq_supported_architectures version result)
  set(list "")
  foreach(architecture IN LISTS MGVQ_ARCHITECTURES)
    if(architecture STREQUAL "110" AND version VERSION_LESS 13.0)
      # Thor was sm_101 from CUDA 12.8 until 13.0 renumbered it.
      if(version VERSION_GREATER_EQUAL 12.8)
        list(APPEND list 101)
      endif()
    elseif(architecture STREQUAL "120" AND version VERSION_LESS 12.8)
      continue()
    else()
      list(APPEND list ${architecture})
    endif()
  endforeach()
  list(POP_BACK list newest)
  list(TRANSFORM list APPEND -real)
  if(newest MATCHES "a$")
    # PTX of an architecture-specific target runs nowhere else: the plain one beside it carries the PTX.
    string(REGEX REPLACE "a$" "" plain ${newest})
    list(APPEND list ${newest}-real ${plain}-virtual)
  else()
    list(APPEND list ${newest})
  endif()
  set(${result} "${list}" PARENT_SCOPE)
endfunction()
