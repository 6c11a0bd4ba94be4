// Walking the rows of a range domain by domain. Everything is clamped, so that wrong offsets cannot lead out of memory.
#pragma once

#include "problem.h"
#include "schedule.h"
#include "target.h"

namespace tikmix_fast::gpu {

TIKMIX_FAST_ANYWHERE int64_t clamp(int64_t value, int64_t low, int64_t high) { return most(low, least(value, high)); }

// The rows of one domain inside the range; none is left if domain == m.
struct Segment {
    int64_t domain, begin, end;
};

// The first domain from `domain` on with rows inside the range. Rows that several domains claim, as only wrong offsets
// can say, are walked once for each.
TIKMIX_FAST_ANYWHERE Segment next_segment(const Domains& domains, RowRange range, int64_t domain) {
    for (; domain < domains.count; ++domain) {
        const int64_t begin = clamp(domains.offsets[domain], range.begin, range.end);
        const int64_t end = clamp(domains.offsets[domain + 1], range.begin, range.end);
        if (begin < end) return {domain, begin, end};
    }
    return {domains.count, range.end, range.end};
}

// Where row `row` of the sorted rows lies.
TIKMIX_FAST_ANYWHERE int64_t place_of_row(const Domains& domains, int64_t rows, int64_t row) {
    return domains.order ? clamp(domains.order[row], 0, rows - 1) : row;
}

}  // namespace tikmix_fast::gpu
