#include <thread>

#include "check.h"
#include "team.h"

TEST(threads_do_everything_once_and_leave_a_loop_together) {
  for (const int threads : {1, 2, 3, 5}) {
    Team team(threads);
    for (const int parts : {0, 1, 4, 64})
      for (const int rounds : {0, 1, 3}) {
        std::vector<int> done(parts * rounds), seen(threads);
#pragma omp parallel num_threads(threads)
        for (int loop = 1; loop < 40; ++loop) {
          team.share(rounds, parts, [&](int round, int part) { ++done[round * parts + part]; });
          for (const int times : done) seen[omp_get_thread_num()] += times != loop;
#pragma omp barrier
        }
        for (const int wrong : seen) CHECK(!wrong);
      }
  }
}

TEST(others_do_what_a_slow_thread_leaves) {
  Team team(2);
  std::atomic<int> done{0};
#pragma omp parallel num_threads(2)
  team.share(1, 10, [&](int, int part) {
    ++done;
    while (part == 5 && done < 10) std::this_thread::yield();  // the first of the second thread's
  });
  CHECK(done == 10);
}
