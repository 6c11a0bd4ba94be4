// Copies the slices of X and dY, with those of their matrices, to shared memory.
#pragma once

#include "problem.h"
#include "projected_plan.h"
#include "ptx.h"
#include "schedule.h"
#include "segments.h"
#include "target.h"

namespace tikmix_fast::gpu {

// Where the eight numbers `chunk` of a row begin. Eight rows that are read at a time fall on different banks.
TIKMIX_FAST_ANYWHERE constexpr uint32_t swizzled(int row_bytes, int row, int chunk) {
    return static_cast<uint32_t>(row * row_bytes + ((chunk ^ (row & 7)) << 4));
}

template <class Shape>
TIKMIX_FAST_DEVICE int count_slices(int64_t columns) {
    return static_cast<int>(most(1, divide_up(columns, Shape::kSliceColumns)));
}

// Fills the stages with the slices of X and dY, rows after rows.
template <class Shape>
class SliceLoader {
    static constexpr int kChunksOfRow = Shape::kRowBytes / 16, kRowsAtOnce = Shape::kThreads / kChunksOfRow;
    static constexpr int kCopies = Shape::kRows / kRowsAtOnce, kMatrixCopies = Shape::kDim / kRowsAtOnce;
    static constexpr uint32_t kStep = kRowsAtOnce * Shape::kRowBytes;

  public:
    TIKMIX_FAST_DEVICE SliceLoader(const ProjectedProblem& problem, RowRange range, SharedAddress stages)
        : problem_(problem),
          end_(range.end),
          begin_(range.begin),
          chunk_(thread_index() % kChunksOfRow),
          to_(stages + swizzled(Shape::kRowBytes, thread_index() / kChunksOfRow, chunk_)) {
        if (begin_ < end_) start();
    }

    // Asks for the next slice, if there is one; always one group of copies.
    TIKMIX_FAST_DEVICE void load(int stage) {
        if (begin_ < end_) {
            --slices_left_;
            const int bytes = slices_left_ > 0 ? 16 : last_bytes_;
            const SharedAddress to = to_ + stage * Shape::kStageBytes;
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kCopies; ++i) {
                copy_async_16(to + i * kStep, from_[i], i * kRowsAtOnce < rows_left_ ? bytes : 0);
                from_[i] += Shape::kRowBytes;
            }
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kMatrixCopies; ++i) {
                copy_async_16(to + (kCopies + i) * kStep, matrix_ + i * kRowsAtOnce * matrix_row_bytes(),
                              bytes > 0 ? 16 : 0);
            }
            matrix_ += Shape::kRowBytes;
            if (slices_left_ == 0) next();
        }
        copy_async_commit();
    }

  private:
    TIKMIX_FAST_DEVICE int64_t columns() const { return is_output_ ? problem_.height : problem_.width; }
    TIKMIX_FAST_DEVICE int64_t matrix_row_bytes() const { return matrix_stride(columns()) * 2; }

    TIKMIX_FAST_DEVICE void next() {
        is_output_ = !is_output_;
        if (!is_output_) begin_ += Shape::kRows;
        if (begin_ < end_) start();
    }

    TIKMIX_FAST_DEVICE void start() {
        const int row = opaque(thread_index()) / kChunksOfRow;
        const Rows& rows = is_output_ ? problem_.grad_output : problem_.input;
        matrix_ = static_cast<const unsigned char*>(is_output_ ? problem_.output_matrix : problem_.input_matrix) +
                  row * matrix_row_bytes() + chunk_ * 16;
        slices_left_ = count_slices<Shape>(columns());
        const int64_t last_column = int64_t{slices_left_ - 1} * Shape::kSliceColumns + chunk_ * 8;
        last_bytes_ = static_cast<int>(clamp((columns() - last_column) * 2, 0, 16));
        rows_left_ = static_cast<int>(least(end_ - begin_, Shape::kRows)) - row;
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kCopies; ++i) {
            const int64_t place =
                place_of_row(problem_.domains, problem_.rows, least(begin_ + row + i * kRowsAtOnce, end_ - 1));
            from_[i] = static_cast<const unsigned char*>(rows.data) + place * rows.stride * 2 + chunk_ * 16;
        }
    }

    const ProjectedProblem& problem_;
    const int64_t end_;
    int64_t begin_;
    const int chunk_;
    const SharedAddress to_;
    bool is_output_ = false;
    int slices_left_ = 0;  // of this side
    int last_bytes_ = 0;   // of this thread's part of the last slice
    int rows_left_ = 0;    // from this thread's first row on
    const unsigned char* matrix_ = nullptr;
    const unsigned char* from_[kCopies] = {};
};

}  // namespace tikmix_fast::gpu
