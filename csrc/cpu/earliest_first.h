// The order in which waiting turns are drawn: of those that have arrived, always the one with the smallest key.
#pragma once

#include <cstdint>

namespace tikmix_fast {

// keys: in the order in which they arrive. arrived [slots]: how many have by each slot. drawn [slots]: the key of each
// slot. Throws std::invalid_argument where none is left.
void earliest_first(const int64_t* keys, const int64_t* arrived, int64_t slots, int64_t* drawn);

}  // namespace tikmix_fast
