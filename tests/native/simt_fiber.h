// A fiber: a function with a stack of its own, left and taken up again by name.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && defined(__linux__) && !defined(SIMT_UCONTEXT)
#define SIMT_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace simt {

#ifdef SIMT_OWN_SWITCH
// swapcontext asks the kernel about signals at every switch. This one keeps what a called function must keep: the stack
// pointer goes to *left, and `taken` becomes the stack.
extern "C" void simt_switch_stack(void** left, void* taken);
asm(R"(
    .pushsection .text
    .weak simt_switch_stack
    .hidden simt_switch_stack
    .type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
    .size simt_switch_stack, .-simt_switch_stack
    .popsection
)");
#endif

// Where a function is: on a stack of its own after start, on the caller's otherwise.
class Fiber {
  public:
    void start(unsigned char* stack, size_t bytes, void (*function)()) {
        bottom_ = stack;
        bytes_ = bytes;
#ifdef SIMT_OWN_SWITCH
        void** top = reinterpret_cast<void**>(stack + bytes) - 1;  // as a call leaves it: 8 more than a multiple of 16
        top[0] = nullptr;                                          // where `function` would return to; it never does
        top[-1] = reinterpret_cast<void*>(function);
        stack_ = top - 7;  // six registers below
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, function, 0);
#endif
    }

    void switch_to(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, other.bottom_, other.bytes_);
#endif
#ifdef SIMT_OWN_SWITCH
        simt_switch_stack(&stack_, other.stack_);
#else
        swapcontext(&context_, &other.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }

    // What `function` does first; `first` is the fiber from which the first one of all was switched to.
    static void entered([[maybe_unused]] Fiber& first) {
#ifdef __SANITIZE_ADDRESS__
        const void* bottom;
        size_t bytes;
        __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
        if (first.bottom_) return;
        first.bottom_ = bottom;
        first.bytes_ = bytes;
#endif
    }

  private:
#ifdef SIMT_OWN_SWITCH
    void* stack_ = nullptr;
#else
    ucontext_t context_;
#endif
    const void* bottom_ = nullptr;
    size_t bytes_ = 0;
};

// Stacks, each behind a page that may not be touched. They are kept for the next launch.
class Stacks {
  public:
    static constexpr size_t kBytes = 128 * 1024;

    ~Stacks() {
        for (unsigned char* stack : stacks_) munmap(stack - page(), kBytes + page());
    }
    unsigned char* at(size_t index) {
        while (stacks_.size() <= index) {
            void* memory = mmap(nullptr, kBytes + page(), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) throw std::bad_alloc();
            stacks_.push_back(static_cast<unsigned char*>(memory) + page());
            if (mprotect(memory, page(), PROT_NONE) != 0) throw std::bad_alloc();
        }
        return stacks_[index];
    }
    // Stacks that all ended at the same offset in a page would share few lines of the processor's cache.
    static size_t usable_bytes(size_t index) { return kBytes - index % 61 * 320; }

  private:
    static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

    std::vector<unsigned char*> stacks_;
};

}  // namespace simt
