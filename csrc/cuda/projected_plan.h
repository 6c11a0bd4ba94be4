// Sizes of the projected kernel: how many rows a block takes at a time, and what it needs of shared memory.
#pragma once

#include "fragments.h"
#include "schedule.h"
#include "target.h"

namespace tikmix_fast::gpu {

// k_out and k_in are padded to kDim; kStages slices are in shared memory, one of them in use.
template <int dim, int rows, int stages>
struct ProjectedShape {
    static constexpr int kDim = dim, kRows = rows, kStages = stages;
    static constexpr int kWarps = 8, kThreads = kWarps * kLanes;
    // A slice: 64 columns of the rows and, below them, of the matrix. Its rows are 128 bytes.
    static constexpr int kSliceColumns = 64, kRowBytes = 128;
    static constexpr int kStageBytes = (kRows + kDim) * kRowBytes;
    // Four warps share the sums of a projection, and another four have the other half of the columns.
    static constexpr int kGroups = 2, kGroupThreads = kThreads / kGroups;
    static constexpr int kWarpRows = kRows * kDim > 128 * 64 ? kRows / 2 : 32;
    static constexpr int kWarpDim = kRows * kDim / (kWarpRows * kWarps / kGroups);
    // Projected rows: high and low part of x, then of y.
    static constexpr int kSmallRowBytes = kDim * 2, kPartBytes = kRows * kSmallRowBytes;
    // Whether y^T x is carried on from rows to rows, where registers hold it besides the sums of a projection.
    static constexpr bool kCarried = kWarpRows * kWarpDim + kDim * kDim / kWarps <= 128 * kLanes;
    // Tasks whose queries are read at a time.
    static constexpr int kTasks = 64 * 64 * 4 / (kDim * kDim);
    static constexpr int kSharedBytes = kStages * kStageBytes + 4 * kPartBytes + 2 * kTasks * kWarps * 4;

    static_assert(kDim % 64 == 0 && kRows % kWarpRows == 0 && kDim % kWarpDim == 0 && kTasks > 0);

    // y^T x as the warps hold it.
    TIKMIX_FAST_ANYWHERE static constexpr TileShape product() { return {kDim, kDim, kDim / 4, kDim / 2}; }
};

// By the shared memory that a block may have: 99 KB from sm_86 on, 163 KB on sm_80, 227 KB on sm_90 and sm_100.
using ProjectedSmall64 = ProjectedShape<64, 64, 4>;
using Projected64 = ProjectedShape<64, 128, 4>;
using ProjectedSmall128 = ProjectedShape<128, 32, 3>;
using ProjectedMedium128 = ProjectedShape<128, 64, 4>;
using Projected128 = ProjectedShape<128, 128, 3>;
static_assert(ProjectedSmall64::kSharedBytes <= 99 << 10 && ProjectedSmall128::kSharedBytes <= 99 << 10);
static_assert(Projected64::kSharedBytes <= 163 << 10 && ProjectedMedium128::kSharedBytes <= 163 << 10);
static_assert(Projected128::kSharedBytes <= 227 << 10);

constexpr int64_t kMostProjectedDim = 128;

struct ProjectedPlan {
    int64_t dim;           // what k_out and k_in are padded to; 0 where they are too large
    int64_t rows_at_once;  // of a block: selects the kernel
    int64_t splits;        // ranges of rows
};

inline ProjectedPlan plan_projected(int64_t rows, int64_t k_out, int64_t k_in, int64_t multiprocessors,
                                    int64_t shared_bytes) {
    const int64_t k = most(k_out, k_in);
    if (k > kMostProjectedDim) return {};
    const int64_t dim = k <= 64 ? 64 : 128;
    int64_t rows_at_once;
    if (dim == 64) {
        rows_at_once = Projected64::kSharedBytes <= shared_bytes ? Projected64::kRows : ProjectedSmall64::kRows;
    } else if (Projected128::kSharedBytes <= shared_bytes) {
        rows_at_once = Projected128::kRows;
    } else {
        rows_at_once =
            ProjectedMedium128::kSharedBytes <= shared_bytes ? ProjectedMedium128::kRows : ProjectedSmall128::kRows;
    }
    return {dim, rows_at_once, most(1, least(multiprocessors, divide_up(rows, most(rows_at_once, kRowBlock))))};
}

// Row stride of the padded matrices, in elements.
TIKMIX_FAST_ANYWHERE constexpr int64_t matrix_stride(int64_t columns) { return divide_up(columns, 8) * 8; }

}  // namespace tikmix_fast::gpu
