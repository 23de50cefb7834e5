// CUDA's words for a kernel that runs on the processor: each thread is a fiber, and they change only
// at barriers, in an order drawn anew from a seed, so that a barrier that is missing is found out.
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __constant__ static const
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() arrive(__LINE__)

struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct Place {
  unsigned x;
};
static Place threadIdx, blockIdx, blockDim, gridDim;

static ucontext_t chooser;
static std::vector<ucontext_t> fibers;
static std::vector<int> barriers;  // the line that each fiber waits at; 0: it has ended
static void** parameters;
static void kernel(void** given);

static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}

static void arrive(int line) {
  const unsigned self = threadIdx.x;
  barriers[self] = line;
  swapcontext(&fibers[self], &chooser);
}

static void begin() {
  kernel(parameters);
  barriers[threadIdx.x] = 0;
}

static void prepare(ucontext_t* fiber, char* stack, size_t size) {
  getcontext(fiber);
  fiber->uc_stack.ss_sp = stack;
  fiber->uc_stack.ss_size = size;
  fiber->uc_link = &chooser;
  makecontext(fiber, begin, 0);
}

// Whether all threads of all blocks came to the same barriers.
extern "C" bool launch(unsigned blocks, unsigned threads, unsigned seed, void** given) {
  const size_t stack_bytes = 64 << 10;
  std::vector<char> stacks(threads * stack_bytes);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(seed);
  fibers.resize(threads);
  parameters = given;
  blockDim.x = threads;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    barriers.assign(threads, -1);
    for (unsigned i = 0; i < threads; i++)
      prepare(&fibers[i], &stacks[i * stack_bytes], stack_bytes);
    while (barriers[0] != 0) {
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned i : order) {
        threadIdx.x = i;
        swapcontext(&chooser, &fibers[i]);
      }
      for (unsigned i = 1; i < threads; i++)
        if (barriers[i] != barriers[0]) return false;
    }
  }
  return true;
}
