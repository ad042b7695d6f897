# cmake -DNM= -DLIBRARY= -P: a plugin library exports what TensorRT looks up, and nothing else.
cmake_minimum_required(VERSION 3.20)
execute_process(COMMAND "${NM}" -D --defined-only --format=posix "${LIBRARY}" OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" lines "${text}")
list(TRANSFORM lines REPLACE " .*" "")
list(SORT lines)
if(NOT lines STREQUAL "getCreators;setLoggerFinder")
  message(FATAL_ERROR "expected exports getCreators;setLoggerFinder, found ${lines}")
endif()
