// Who may read and write which bytes of shared memory without a race: what one warp did is known to another one only
// after both have met at a barrier, or passed something on.
//
// Warps count their steps; a clock holds, for every warp, the last step that is known. What the lanes of one warp do
// among themselves is not watched, nor what a kernel does by plain pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace simt {

using Clock = std::vector<uint32_t>;

inline void learn(Clock& clock, const Clock& from) {
    if (clock.size() < from.size()) clock.resize(from.size());
    for (size_t warp = 0; warp < from.size(); ++warp) clock[warp] = std::max(clock[warp], from[warp]);
}

class Accesses {
  public:
    static constexpr int64_t kGrain = 16;

    Accesses() = default;
    Accesses(int64_t bytes, int warps)
        : warps_(static_cast<size_t>(warps)),
          writes_(static_cast<size_t>((bytes + kGrain - 1) / kGrain)),
          reads_(writes_.size() * warps_) {}

    // Why `warp`, which knows what `clock` says, may not read this place; nothing if it may.
    std::optional<std::string> read(int64_t offset, int warp, const Clock& clock) {
        const size_t grain = static_cast<size_t>(offset / kGrain);
        const Write& last = writes_[grain];
        reads_[grain * warps_ + static_cast<size_t>(warp)] = clock[static_cast<size_t>(warp)];
        if (last.under_way) return "is filled by a copy that warp " + std::to_string(last.warp) + " has not waited for";
        if (unknown(last.warp, last.step, warp, clock)) return raced(last.warp, "wrote");
        return std::nullopt;
    }

    // Why `warp` may not begin to write there.
    std::optional<std::string> begin_write(int64_t offset, int warp, const Clock& clock) {
        const size_t grain = static_cast<size_t>(offset / kGrain);
        const Write last = writes_[grain];
        writes_[grain] = {warp, clock[static_cast<size_t>(warp)], true};
        if (last.under_way) return "is filled by a copy that warp " + std::to_string(last.warp) + " has not waited for";
        if (unknown(last.warp, last.step, warp, clock)) return raced(last.warp, "wrote");
        for (size_t reader = 0; reader < warps_; ++reader) {
            if (unknown(static_cast<int>(reader), reads_[grain * warps_ + reader], warp, clock)) {
                return raced(static_cast<int>(reader), "read");
            }
        }
        return std::nullopt;
    }

    // What was under way is there, for the warp that has waited.
    void end_write(int64_t offset, int warp, const Clock& clock) {
        writes_[static_cast<size_t>(offset / kGrain)] = {warp, clock[static_cast<size_t>(warp)], false};
    }

    // Whoever writes these bytes now is watched in another way.
    void forget(int64_t offset, int64_t bytes) {
        const auto first = offset / kGrain, count = (bytes + kGrain - 1) / kGrain;
        std::fill_n(writes_.begin() + first, count, Write());
        std::fill_n(reads_.begin() + first * static_cast<int64_t>(warps_), count * static_cast<int64_t>(warps_), 0);
    }

  private:
    struct Write {
        int warp = 0;
        uint32_t step = 0;  // steps begin at 1
        bool under_way = false;
    };

    static bool unknown(int by, uint32_t step, int warp, const Clock& clock) {
        return by != warp && step > clock[static_cast<size_t>(by)];
    }
    static std::string raced(int warp, const char* did) {
        return "warp " + std::to_string(warp) + " " + did + " with no barrier since";
    }

    size_t warps_ = 0;
    std::vector<Write> writes_;
    std::vector<uint32_t> reads_;  // [grain][warp]
};

}  // namespace simt
