// The parts of plugin_check.
#pragma once

#include "fakes.h"
#include "memory.h"

void check_creation(Library& library);
void check_shapes_and_formats(Library& library);
void check_planning(Library& library);
void check_planning_without_device(Library& library);
void check_runs(Library& library, Memory& memory);
void check_run_refusals(Library& library, Memory& memory);
