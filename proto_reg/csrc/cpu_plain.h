// What the code for an instruction set uses but is itself compiled for every machine. A source includes it before
// BEGIN_TARGET, and headers behind that include no standard header: its functions would get the target, and the linker
// could keep them for machines without the instructions.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_target.h"
#include "cpu_workspace.h"
#include "mmd_cpu_clusters.h"
