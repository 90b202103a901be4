// Shares the loops of a decoding step among its threads.
//
// A core reads again what is in its own caches faster than from memory or another core's cache. So
// a thread takes the same part of a loop at every step, whether weights or cached keys, and then
// steals what others have left: cores are seldom equally fast, because other processes and other
// virtual machines slow down now one, now another. Blumofe and Leiserson 1999, work stealing.

#pragma once

#include <atomic>
#include <vector>

// Declared in <omp.h>, which Apple's compiler lacks.
extern "C" int omp_get_num_threads();
extern "C" int omp_get_thread_num();

namespace {

class Team {  // the threads of one parallel region
 public:
  explicit Team(int threads) : members(threads) {}

  // Call run(round, part) for all of `rounds` x `parts`. All threads of a parallel region call
  // this and leave it together.
  template <typename Run>
  void share(int rounds, int parts, const Run &run) {
    const int threads = omp_get_num_threads(), own = omp_get_thread_num();
    const int loop = members[own].loops++ % 2;
    members[own].taken[1 - loop] = 0;  // for the next loop: all threads have left the last one
    for (int i = 0; i < threads; ++i) {
      const int of = (own + i) % threads;
      const int first = start(of, parts, threads), count = start(of + 1, parts, threads) - first;
      for (int item; (item = members[of].taken[loop]++) < rounds * count;)
        run(item / count, first + item % count);
    }
#pragma omp barrier
  }

 private:
  struct alignas(128) Member {  // against false sharing
    int loops = 0;
    std::atomic<int> taken[2] = {};  // items taken from its part, in this loop and the next
  };

  static int start(int member, int parts, int threads) { return (int64_t)parts * member / threads; }

  std::vector<Member> members;
};

}  // namespace
