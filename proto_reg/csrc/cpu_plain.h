// Everything that code for an instruction set uses but that is itself compiled for every machine. A source includes
// this before BEGIN_TARGET: a standard header behind it would give its functions the target, and the linker could then
// keep such a function for machines that lack the instructions. Hence a header that is compiled for an instruction set
// includes this file and no standard header.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_target.h"
#include "cpu_workspace.h"
#include "mmd_cpu_clusters.h"
