#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct Grid {
  void sync() const { emulation::wait(*emulation::self->block->grid_barrier); }
};

struct Cluster {
  void sync() const { emulation::wait(*emulation::self->block->cluster_barrier); }
  unsigned block_rank() const { return emulation::self->block->rank; }
  template <class T>
  T* map_shared_rank(T* mine, int rank) const {
    emulation::Block* const block = emulation::self->block;
    return mine - block->shared + block->cluster[rank].shared;
  }
};

inline Grid this_grid() { return {}; }
inline Cluster this_cluster() { return {}; }

}  // namespace cooperative_groups
