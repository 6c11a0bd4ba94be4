#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "problem.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tikmix_fast {
namespace {

#ifdef TIKMIX_FAST_SANITIZE
// Memory ends where it was asked to end and is never used twice, so that a sanitizer sees every overrun.
constexpr int64_t kWholePage = kCacheLine;
constexpr size_t kMostKept = 0;
#else
// Small pages would cost more address translations than the translation cache holds.
constexpr int64_t kWholePage = int64_t{2} << 20;
// One call at a time is what there is nearly always; more memory than this is not kept.
constexpr size_t kMostKept = 2;
#endif
constexpr int64_t kMostBytesKept = int64_t{64} << 20;

std::mutex mutex;
std::vector<std::pair<void*, int64_t>>& kept() {
    // Never destroyed: a thread may still give memory back while the process ends.
    static auto* memory = [] {
        auto* made = new std::vector<std::pair<void*, int64_t>>;
        made->reserve(kMostKept + 1);  // giving back must not throw
        return made;
    }();
    return *memory;
}

}  // namespace

Workspace::Workspace(int64_t bytes) : data_(nullptr), bytes_((bytes + kWholePage - 1) / kWholePage * kWholePage) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        auto& memory = kept();
        for (auto each = memory.begin(); each != memory.end(); ++each) {
            if (each->second >= bytes_) {
                std::tie(data_, bytes_) = *each;
                memory.erase(each);
                return;
            }
        }
    }
    data_ = std::aligned_alloc(kWholePage, bytes_);
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Workspace::~Workspace() {
    if (bytes_ <= kMostBytesKept) {
        const std::lock_guard<std::mutex> lock(mutex);
        auto& memory = kept();
        memory.emplace_back(data_, bytes_);
        data_ = nullptr;
        if (memory.size() > kMostKept) {
            data_ = memory.front().first;
            memory.erase(memory.begin());
        }
    }
    std::free(data_);
}

}  // namespace tikmix_fast
