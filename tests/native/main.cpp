// Runs the tests of one file: main NAME runs those of test_NAME.cpp.

#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <string>

#include "check.h"

int main(int count, char **arguments) {
  if (count != 2) return 2;
#ifdef __AMX_TILE__
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 3;  // as processor.py asks for tiles
#endif
  const std::string file = std::string("test_") + arguments[1] + ".cpp";
  int run = 0;
  for (const Test &test : all_tests())
    if (std::string(test.file).rfind("/" + file) != std::string::npos) {
      test.run();
      std::printf("%s\n", test.name), ++run;
    }
  return run ? 0 : 2;
}
