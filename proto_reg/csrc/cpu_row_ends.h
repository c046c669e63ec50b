// Vectors of which only the first `present` lanes are in memory, at least one: how rows end. Included after
// sinkhorn_cpu_vector.h, inside the same namespace and target; hence no include guard.

// The other lanes are 0.
INLINE V load_first(const float* from, int64_t present) {
  if (present >= LANES) return load(from);
  V x{};
  __builtin_memcpy(&x, from, sizeof(float) * present);
  return x;
}

INLINE void store_first(float* to, V x, int64_t present) {
  if (present >= LANES) store(to, x);
  else __builtin_memcpy(to, &x, sizeof(float) * present);
}
