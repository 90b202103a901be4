// How the threads of a decoding step share its loops.
//
// A core reads what it has read before from caches of its own, faster than from memory or from
// another's. So a thread takes the same part of a loop at every step, of weights and of kept keys
// alike, and when that is done what others have left: cores are seldom equally fast, for others'
// work and other machines' take from each in turn. Blumofe and Leiserson 1999, work stealing.

#pragma once

#include <atomic>
#include <vector>

// Of <omp.h>, which Apple's compiler does not come with.
extern "C" int omp_get_num_threads();
extern "C" int omp_get_thread_num();

namespace {

class Team {  // of the threads of one parallel region
 public:
  explicit Team(int threads) : members(threads) {}

  // Call run(round, part) for all of `rounds` x `parts`. All threads of a parallel region call
  // this, and leave it together.
  template <typename Run>
  void share(int rounds, int parts, const Run &run) {
    const int threads = omp_get_num_threads(), own = omp_get_thread_num();
    const int loop = members[own].loops++ % 2;
    members[own].taken[1 - loop] = 0;  // of the next loop: all threads have left the one before
    for (int i = 0; i < threads; ++i) {
      const int of = (own + i) % threads;
      const int first = start(of, parts, threads), count = start(of + 1, parts, threads) - first;
      for (int item; (item = members[of].taken[loop]++) < rounds * count;)
        run(item / count, first + item % count);
    }
#pragma omp barrier
  }

 private:
  struct alignas(128) Member {  // alone in the lines that a core fetches
    int loops = 0;
    std::atomic<int> taken[2] = {};  // items of its part, of this loop and of the next
  };

  static int start(int member, int parts, int threads) { return (int64_t)parts * member / threads; }

  std::vector<Member> members;
};

}  // namespace
