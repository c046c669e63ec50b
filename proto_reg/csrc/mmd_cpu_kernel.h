// The anchored MMD with its gradient for one instruction set. cpu_kernel_table.h puts solve_mmd into its table.
#pragma once

#include "cpu_vector.h"

namespace proto_reg { namespace {

// Memory that the thread keeps, because a page fault costs more than a small problem. Nothing is initialised.
template <int SLOT>
float* kept(int64_t size) {
  static thread_local std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(size)) memory.resize(size);
  return memory.data();
}

template <class S>
// What all blocks share: rows less the mean of their cluster, and each row's attraction to its anchor.
struct MmdGradient {
  using V = typename S::V;
  static constexpr int64_t LANES = S::LANES;

  const MmdProblem& problem;
  const Mixture& mixture;
  const Sorted& sorted;
  const ParallelFor parallel_for;
  const int64_t padded;  // dim, rounded up to whole vectors
  // In the order of the sorted rows: z - anchor - mean, and behind the rows of each cluster their mean of z - anchor.
  float* residuals;
  float *attractions, *slopes;  // a(r) and its slope, by sorted row

  template <class Body>
  void each(int64_t count, const Body& body) const {
    const auto task = [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); };
    if (problem.rows * problem.dim < 1 << 14)
      for (int64_t index = 0; index < count; ++index) body(index);
    else parallel_for(count, task, const_cast<Body*>(&body));
  }

  // Row i of cluster c; i == count: its mean.
  float* row(int64_t c, int64_t i) const { return residuals + (sorted.clusters[c].first + c + i) * padded; }

  // Subtracts the mean: far from its anchor it is so large that float32 would lose how the cluster's latents differ.
  void centre(int64_t c) const {
    const Cluster cluster = sorted.clusters[c];
    float* mean = row(c, cluster.count);
    std::memset(mean, 0, sizeof(float) * padded);
    const float* anchor = problem.anchors + cluster.group * problem.dim;
    for (int64_t i = 0; i < cluster.count; ++i) {
      const float* z = problem.z + sorted.rows[cluster.first + i] * problem.dim;
      V squares{};
      for (int64_t d = 0; d < padded; d += LANES) {
        const V r = load_first<V>(z + d, problem.dim - d) - load_first<V>(anchor + d, problem.dim - d);
        squares += r * r;
        store(row(c, i) + d, r);
        store(mean + d, load<V>(mean + d) + r);
      }
      attract(cluster.first + i, sum(squares));
    }
    const float share = 1.0f / static_cast<float>(cluster.count);
    for (int64_t d = 0; d < padded; d += LANES) store(mean + d, load<V>(mean + d) * share);
    for (int64_t i = 0; i < cluster.count; ++i)
      for (int64_t d = 0; d < padded; d += LANES) store(row(c, i) + d, load<V>(row(c, i) + d) - load<V>(mean + d));
  }

  // 2^x for x <= 126; 0 where that is too small for a normal number. NaN stays NaN.
  static INLINE V exp2_or_zero(V x) {
    const V lowest = V{} - 126.0f;
    return x < lowest ? V{} : exp2_in_range(S::maximum(x, lowest));
  }

  // a(r) and its derivative by |r|^2. Each lane computes one bandwidth.
  INLINE void attract(int64_t i, float squared) const {
    const int64_t count = static_cast<int64_t>(mixture.scales.size());
    V value{}, slope{};
    for (int64_t start = 0; start < count; start += LANES) {
      V rates{}, values{}, factors{};
      for (int64_t s = 0; s < std::min(LANES, count - start); ++s) {
        const Scale& scale = mixture.scales[start + s];
        rates[s] = scale.a_rate, values[s] = scale.a_value, factors[s] = scale.a_slope;
      }
      const V a = exp2_or_zero(squared * rates) * values;
      value += a;
      slope += a * factors;
    }
    attractions[i] = sum(value);
    slopes[i] = sum(slope);
  }

  // k, not yet divided by the number of scales, and its derivative by the squared distance.
  INLINE void pair(V squared, V& k, V& slope) const {
    V e{};
    k = slope = V{};
    for (const Scale& scale : mixture.scales) {
      e = scale.squares ? e * e : exp2_or_zero(squared * scale.rate);
      k += e;
      slope += e * scale.slope;
    }
  }

  double unit(const Cluster& cluster) const {
    return problem.by_mass ? static_cast<double>(cluster.count) / static_cast<double>(sorted.counted) : 1.0;
  }
  double pairs(const Cluster& cluster) const {
    const double n = static_cast<double>(cluster.count);
    return 1 / (problem.unbiased ? n * (n - 1) : n * n);
  }
};

// Up to VECTORS * LANES rows of a cluster against all its rows. The kernel matrix is computed in tiles.
template <class S, int VECTORS>
struct MmdBlock {
  using V = typename S::V;
  static constexpr int64_t LANES = S::LANES, WIDTH = VECTORS * LANES, TILE = 64, ROWS = 4;
  const MmdGradient<S>& solver;
  const int64_t c, begin;
  const Cluster cluster = solver.sorted.clusters[c];
  const int64_t rows = std::min(WIDTH, cluster.count - begin), dim = solver.problem.dim, padded = solver.padded;
  // The block's rows transposed (padded, WIDTH); slope x over all rows (WIDTH, padded); a tile's slopes (TILE, WIDTH).
  float* panel = kept<1>((2 * padded + TILE) * WIDTH);
  float *pulled = panel + padded * WIDTH, *tile = pulled + padded * WIDTH;
  V k_sums[VECTORS]{}, slope_sums[VECTORS]{};

  MmdBlock(const MmdGradient<S>& solver_, int64_t c_, int64_t begin_) : solver(solver_), c(c_), begin(begin_) {}

  // Writes the gradient of the block's rows, and returns their part of the cluster's statistic.
  double run() {
    // If the cluster is one block with long rows, half its pairs are enough, and nothing is transposed.
    const bool alone = rows == cluster.count && padded >= 4 * LANES;
    if (!alone) pack();
    std::memset(pulled, 0, sizeof(float) * padded * WIDTH);
    for (int64_t from = 0; from < cluster.count; from += TILE) {
      const int64_t to = std::min(cluster.count, from + TILE);
      if (alone)
        for (int64_t j = 0; j < rows; ++j) own_distances(j);
      else
        for (int64_t j = from; j < to; j += ROWS) distances(j, tile + (j - from) * WIDTH);
      kernels(from, to);
      for (int64_t i = 0; i < rows; i += 4) {
        int64_t d = 0;
        for (; d + 4 * LANES <= padded; d += 4 * LANES) pull<4>(i, d, from, to);
        for (; d < padded; d += LANES) pull<1>(i, d, from, to);
      }
    }
    return finish();
  }

  void pack() {
    for (int64_t i = 0; i < WIDTH; ++i) {
      const float* x = solver.row(c, begin + std::min(i, rows - 1));  // the values in spare lanes are not used
      for (int64_t d = 0; d < dim; ++d) panel[d * WIDTH + i] = x[d];
    }
  }

  // Squared distances of the block's rows from rows j, ..., j + ROWS - 1. Behind the last row are ROWS - 1 spare ones.
  INLINE void distances(int64_t j, float* out) const {
    const float* x = solver.row(c, j);
    V sums[ROWS][VECTORS]{};
    for (int64_t d = 0; d < dim; ++d)
#pragma GCC unroll 4
      for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int64_t v = 0; v < VECTORS; ++v) {
          const V difference = load<V>(panel + d * WIDTH + v * LANES) - x[r * padded + d];
          sums[r][v] += difference * difference;
        }
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t v = 0; v < VECTORS; ++v) store(out + r * WIDTH + v * LANES, sums[r][v]);
  }

  // Squared distances of row j from the rows before it, written on both sides of the diagonal.
  INLINE void own_distances(int64_t j) const {
    const float* x = solver.row(c, j);
    for (int64_t i = 0; i < j; i += ROWS) {
      const float* y = solver.row(c, i);
      V sums[ROWS]{};
      for (int64_t d = 0; d < padded; d += LANES)
#pragma GCC unroll 4
        for (int64_t r = 0; r < ROWS; ++r) {
          const V difference = load<V>(x + d) - load<V>(y + r * padded + d);
          sums[r] += difference * difference;
        }
      for (int64_t r = 0; r < std::min(ROWS, j - i); ++r)
        tile[j * WIDTH + i + r] = tile[(i + r) * WIDTH + j] = sum(sums[r]);
    }
    for (int64_t i = rows; i < WIDTH; ++i) tile[j * WIDTH + i] = 0;  // spare lanes
    tile[j * WIDTH + j] = 0;
  }

  // Replaces squared distances from rows [from, to) by slopes, and adds kernels and slopes to the sums of the block's
  // rows.
  void kernels(int64_t from, int64_t to) {
    for (int64_t v = 0; v < VECTORS; ++v) {
      V k_sum{}, slope_sum{};
      const IntsOf<V> own = lane_numbers<V>() + static_cast<int32_t>(begin + v * LANES);
      for (int64_t j = from; j < to; ++j) {
        float* entry = tile + (j - from) * WIDTH + v * LANES;
        V k, slope;
        solver.pair(load<V>(entry), k, slope);
        const IntsOf<V> other = own != static_cast<int32_t>(j);
        k = other ? k : V{};
        slope = other ? slope : V{};
        k_sum += k;
        slope_sum += slope;
        store(entry, slope);
      }
      k_sums[v] += k_sum;
      slope_sums[v] += slope_sum;
    }
  }

  // Adds sum_j slope_ij x_j, j in [from, to), to rows i, ..., i + 3 of `pulled`: COLUMNS vectors from column d on.
  template <int COLUMNS>
  INLINE void pull(int64_t i, int64_t d, int64_t from, int64_t to) const {
    V sums[4][COLUMNS]{};
    const float* x = solver.row(c, from) + d;
    const float* slope = tile + i;
    for (int64_t j = from; j < to; ++j, x += padded, slope += WIDTH)
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int64_t v = 0; v < COLUMNS; ++v) sums[r][v] += slope[r] * load<V>(x + v * LANES);
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t v = 0; v < COLUMNS; ++v) {
        float* to_row = pulled + (i + r) * padded + d + v * LANES;
        store(to_row, load<V>(to_row) + sums[r][v]);
      }
  }

  double finish() const {
    const double n = static_cast<double>(cluster.count), unit = solver.unit(cluster), pairs = solver.pairs(cluster);
    const float scale = static_cast<float>(4 * pairs * unit);
    const float* centre = solver.row(c, cluster.count);
    double value = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t place = cluster.first + begin + i;
      value += pairs / static_cast<double>(solver.mixture.scales.size()) * k_sums[i / LANES][i % LANES];
      value -= 2 / n * solver.attractions[place];
      const float* x = solver.row(c, begin + i);
      const float own = slope_sums[i / LANES][i % LANES], back = static_cast<float>(4 / n * unit) * solver.slopes[place];
      float* gradient = solver.problem.gradient + solver.sorted.rows[place] * dim;
      for (int64_t d = 0; d < dim; d += LANES) {
        const V at = load<V>(x + d);
        const V g = scale * (own * at - load<V>(pulled + i * padded + d)) - back * (at + load<V>(centre + d));
        store_first(gradient + d, g, dim - d);
      }
    }
    return value;
  }
};

template <class S>
inline void solve_mmd(const MmdProblem& problem, ParallelFor parallel_for) {
  constexpr int64_t LANES = S::LANES;
  const Sorted sorted(problem);
  const Mixture mixture(problem.scales, static_cast<double>(problem.dim), problem.std);
  const int64_t members = static_cast<int64_t>(sorted.rows.size()), count = static_cast<int64_t>(sorted.clusters.size());
  const int64_t padded = (problem.dim + LANES - 1) / LANES * LANES, matrix = (members + count + 3) * padded;
  std::unique_ptr<float[]> owned;
  float* memory = matrix <= 1 << 18 ? kept<0>(matrix + 2 * members) : nullptr;
  if (!memory) owned.reset(new float[matrix + 2 * members]), memory = owned.get();
  const MmdGradient<S> solver{problem, mixture, sorted, parallel_for, padded, memory, memory + matrix,
                      memory + matrix + members};
  solver.each(count, [&](int64_t c) { solver.centre(c); });

  struct Place {
    int64_t cluster, begin;
  };
  std::vector<Place> blocks;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t begin = 0; begin < sorted.clusters[c].count; begin += 2 * LANES) blocks.push_back({c, begin});
  std::vector<double> values(blocks.size());
  solver.each(static_cast<int64_t>(blocks.size()), [&](int64_t b) {
    const auto [c, begin] = blocks[b];
    values[b] = sorted.clusters[c].count - begin <= LANES ? MmdBlock<S, 1>(solver, c, begin).run()
                                                          : MmdBlock<S, 2>(solver, c, begin).run();
  });

  double loss = 0;
  for (size_t b = 0; b < blocks.size(); ++b) loss += solver.unit(sorted.clusters[blocks[b].cluster]) * values[b];
  for (const Cluster& cluster : sorted.clusters)
    loss += solver.unit(cluster) * (mixture.self + (problem.unbiased ? 0 : 1 / static_cast<double>(cluster.count)));
  *problem.loss = static_cast<float>(loss);
}

}}  // namespace proto_reg
