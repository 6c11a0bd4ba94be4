// What the CUDA runtime says about this machine, without its headers.
#pragma once

namespace tikmix_fast {

// Toolkit the module was built with, as 1000 * major + 10 * minor.
int toolkit_version();

// Returns null and fills the capability, or returns the runtime's error text.
const char* compute_capability(int device, int* major, int* minor);

}  // namespace tikmix_fast
