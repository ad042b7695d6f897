# What the libraries are made of, for every CMakeLists.txt that builds them; paths are absolute.
set(_here "${CMAKE_CURRENT_LIST_DIR}")
set(MGVQ_DISPATCH_SOURCES "${_here}/dispatch.cpp")
set(MGVQ_KERNEL_SOURCES "${_here}/kernels.cu" "${_here}/rows.cu" "${_here}/gather.cu")
foreach(code 2_3_8 2_4_8 2_5_8 2_6_6 2_6_8 2_8_8 2_8_9 4_8_8 4_8_9)
  list(APPEND MGVQ_KERNEL_SOURCES "${_here}/code_${code}.cu")
endforeach()
set(MGVQ_EMULATOR_SOURCES "${_here}/../emulator/emulator.cpp")
set(MGVQ_EMULATOR_INCLUDES "${_here}/../emulator/include" "${_here}/..")
