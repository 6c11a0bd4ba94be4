// Memory that is kept between calls, so that its pages are not asked for again and again.
#pragma once

#include <cstdint>

namespace tikmix_fast {

constexpr int64_t kCacheLine = 64;

// Borrows memory, and gives it back when it goes out of scope. What lies in it is undefined.
class Workspace {
  public:
    // Throws std::bad_alloc where there is none.
    explicit Workspace(int64_t bytes);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // Aligned to cache lines.
    void* data() const { return data_; }

  private:
    void* data_;
    int64_t bytes_;
};

}  // namespace tikmix_fast
