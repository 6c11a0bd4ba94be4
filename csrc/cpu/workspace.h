// Memory that is kept between calls, so that its pages are not asked for again and again.
#pragma once

#include <cstdint>
#ifdef TIKMIX_FAST_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

namespace tikmix_fast {

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

// Says that these bytes of a workspace belong to none of its parts, so that a sanitizer sees who uses them.
inline void leave_empty([[maybe_unused]] const float* first, [[maybe_unused]] int64_t floats) {
#ifdef TIKMIX_FAST_SANITIZE
    ASAN_POISON_MEMORY_REGION(first, floats * sizeof(float));
#endif
}

}  // namespace tikmix_fast
