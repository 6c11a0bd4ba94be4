#include "earliest_first.h"

#include <functional>
#include <queue>
#include <stdexcept>
#include <vector>

namespace tikmix_fast {

void earliest_first(const int64_t* keys, const int64_t* arrived, int64_t slots, int64_t* drawn) {
    std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> waiting;
    int64_t seen = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
        for (; seen < arrived[slot]; ++seen) waiting.push(keys[seen]);
        if (waiting.empty()) throw std::invalid_argument("more slots than keys that have arrived");
        drawn[slot] = waiting.top();
        waiting.pop();
    }
}

}  // namespace tikmix_fast
