// SPDX-License-Identifier: Apache-2.0
// The scheduler of simt.h, and the few functions of the CUDA runtime that launchers call. ThreadSanitizer is told what
// is ordered (SIMT_THREAD_SANITIZER), but does not watch the scheduler itself.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#error "fibers are switched by a few lines of x86-64 assembly"
#endif

#if defined(SIMT_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

// Saves the callee-saved registers and the stack pointer, and goes on where the other stack was left.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.local simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, . - simt_switch
)");

namespace simt {
namespace {

constexpr size_t stack_bytes = 64 << 10, page = 4096;
constexpr int shared_without_asking = 48 << 10;
constexpr size_t most_copies = 1024;  // of a thread, on their way

enum class Order { forward, reverse, random };
enum class State { ready, at_barrier, in_collective, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, given;
};

struct Thread {
  Position position;
  int index;
  State state = State::ready;
  void* stack_pointer;
  char* stack;
  const char* site = nullptr;  // barrier or collective where it waits
  unsigned mask = 0;
  const void* input = nullptr;
  void* output = nullptr;
  // Asynchronous copies on their way, oldest first, and how many each committed group has. The room is made by the
  // scheduler: what a fiber allocates and another frees would look like a race.
  std::vector<Copy> copies;
  std::vector<size_t> groups;
  size_t committed = 0;        // of the copies
  void* fiber = nullptr;       // ThreadSanitizer's
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// The launch that is running; there is one at a time.
struct Launch {
  dim3 grid, block;
  uint3 index;
  unsigned char* shared = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads;
  Thread* running = nullptr;
  void* scheduler_stack = nullptr;
  void* scheduler_fiber = nullptr;
  void* scheduler_fake = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  std::string error;
  // Addresses that stand for synchronisation in ThreadSanitizer's eyes.
  char at_barrier = 0, at_end = 0, in_warp[32] = {};
};

Launch now;
std::mutex one_at_a_time;
cudaError_t last_error = cudaSuccess;
std::map<const void*, int> asked;  // shared memory that a kernel has asked for

void acquire([[maybe_unused]] char& address) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_acquire(&address);
#endif
}

void release([[maybe_unused]] char& address) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_release(&address);
#endif
}

std::string setting(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

Order order() {
  const std::string name = setting("PYDISTILL_SIMT_ORDER", "forward");
  if (name == "forward") return Order::forward;
  if (name == "reverse") return Order::reverse;
  if (name == "random") return Order::random;
  throw std::runtime_error("simt: PYDISTILL_SIMT_ORDER must be forward, reverse or random, got " + name);
}

// Shared memory that a block of the simulated device can have: 227 KiB, as on sm_90, unless a test wants less.
int most_shared() { return std::stoi(setting("PYDISTILL_SIMT_SHARED", "232448")); }

void to_scheduler() {
  Thread* const self = now.running;
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(now.scheduler_fiber, 1);  // 1: the switch itself orders nothing
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->state == State::done ? nullptr : &self->fake_stack, now.scheduler_bottom,
                                 now.scheduler_size);
#endif
  simt_switch(&self->stack_pointer, now.scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &now.scheduler_bottom, &now.scheduler_size);
#endif
}

void to_thread(Thread& thread) {
  now.running = &thread;
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(thread.fiber, 1);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&now.scheduler_fake, thread.stack, stack_bytes);
#endif
  simt_switch(&now.scheduler_stack, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(now.scheduler_fake, nullptr, nullptr);
#endif
}

// Parks the running thread for good; the scheduler throws.
[[noreturn]] void fail(const std::string& what) {
  now.error = what + " (block " + std::to_string(now.index.x) + ", thread " + std::to_string(now.running->index) + ")";
  now.running->state = State::done;
  to_scheduler();
  std::abort();
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &now.scheduler_bottom, &now.scheduler_size);
#endif
  (*now.body)();
  Thread& self = *now.running;
  if (self.copies.size() > self.committed) fail("a thread ends with asynchronous copies that it has not committed");
  release(now.at_end);
  self.state = State::done;
  to_scheduler();
  std::abort();
}

// Stacks are used again, but for ThreadSanitizer, to which every block's must be fresh memory.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) {
      char* const begin = static_cast<char*>(mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (begin == MAP_FAILED) throw std::runtime_error("simt: no memory for a stack");
      mprotect(begin, page, PROT_NONE);
      return begin + page;
    }
    char* const stack = free_.back();
    free_.pop_back();
    return stack;
  }

  void give(char* stack) {
#if defined(SIMT_THREAD_SANITIZER)
    munmap(stack - page, stack_bytes + page);
#else
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, stack_bytes);
#endif
    free_.push_back(stack);
#endif
  }

 private:
  std::vector<char*> free_;
};

Stacks stacks;

// A block's shared memory, filled with NaN of every type. Fresh for every block, for nothing orders them.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes), mapped_((bytes / page + 1) * page) {
    begin_ =
        static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (begin_ == MAP_FAILED) throw std::runtime_error("simt: no shared memory");
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(begin_ + bytes_, mapped_ - bytes_);
#endif
  }
  ~Shared() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(begin_, mapped_);
#endif
    munmap(begin_, mapped_);
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  unsigned char* poisoned() {
    for (size_t i = 0; i < bytes_; ++i) begin_[i] = 0xff;
    return begin_;
  }

 private:
  unsigned char* begin_;
  size_t bytes_, mapped_;
};

void start_thread(Thread& thread, int index) {
  thread = Thread{};
  thread.index = index;
  thread.copies.reserve(most_copies);
  thread.groups.reserve(most_copies);
  const unsigned x = now.block.x, y = now.block.y, i = index;
  thread.position = {{i % x, i / x % y, i / (x * y)}, index % 32};
  thread.stack = stacks.take();
#if defined(SIMT_THREAD_SANITIZER)
  thread.fiber = __tsan_create_fiber(0);
#endif
  // As simt_switch leaves a stack: six registers, then the return address, on a stack aligned as at a function's entry.
  void** top = reinterpret_cast<void**>(thread.stack + stack_bytes) - 3;
  *--top = reinterpret_cast<void*>(&entry);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  thread.stack_pointer = top;
}

// Nobody can run: what do they wait for?
void resolve_waiting() {
  int at_barrier = 0, in_collective = 0, done = 0;
  const Thread *first = nullptr, *other = nullptr, *caught = nullptr;
  for (const Thread& thread : now.threads) {
    at_barrier += thread.state == State::at_barrier;
    in_collective += thread.state == State::in_collective;
    done += thread.state == State::done;
    if (thread.state == State::in_collective) caught = &thread;
    if (thread.state != State::at_barrier) continue;
    if (first == nullptr) first = &thread;
    if (std::strcmp(thread.site, first->site) != 0) other = &thread;
  }
  if (in_collective > 0)
    now.error = std::string("deadlock: ") + caught->site + " waits for lanes of its mask that do not come";
  else if (at_barrier > 0 && done > 0)
    now.error = std::string("barrier ") + first->site + " is never reached by " + std::to_string(done) + " threads";
  else if (other != nullptr)
    now.error = std::string("threads stand at two barriers: ") + first->site + " and " + other->site;
  if (!now.error.empty()) return;
  for (Thread& thread : now.threads)
    if (thread.state == State::at_barrier) thread.state = State::ready;
}

void run_block(std::mt19937_64& random, Order order, size_t shared_bytes) {
  Shared shared(shared_bytes);
  now.shared = shared.poisoned();
  const int count = static_cast<int>(now.block.x * now.block.y * now.block.z);
  now.threads.resize(count);
  std::vector<int> turn(count);
  for (int i = 0; i < count; ++i) {
    start_thread(now.threads[i], i);
    turn[i] = order == Order::reverse ? count - 1 - i : i;
  }
  now.error.clear();
  while (now.error.empty()) {
    if (order == Order::random) std::shuffle(turn.begin(), turn.end(), random);
    bool moved = false;
    for (const int i : turn) {
      if (now.threads[i].state != State::ready) continue;
      moved = true;
      to_thread(now.threads[i]);
      if (!now.error.empty()) break;
    }
    if (moved) continue;
    const auto done = [](const Thread& thread) { return thread.state == State::done; };
    if (std::all_of(now.threads.begin(), now.threads.end(), done)) break;
    resolve_waiting();
  }
  for (Thread& thread : now.threads) {
    stacks.give(thread.stack);
#if defined(SIMT_THREAD_SANITIZER)
    __tsan_destroy_fiber(thread.fiber);
#endif
  }
  if (!now.error.empty()) throw std::runtime_error("simt: " + now.error);
}

}  // namespace

const Position& position() { return now.running->position; }
uint3 block_index() { return now.index; }
dim3 block_size() { return now.block; }
dim3 grid_size() { return now.grid; }
unsigned char* shared_memory() { return now.shared; }

void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    last_error = cudaErrorInvalidConfiguration;
  const auto request = asked.find(kernel);
  const int allowed = request == asked.end() ? shared_without_asking : request->second;
  if (shared_bytes > static_cast<size_t>(allowed)) last_error = cudaErrorInvalidValue;
  if (last_error != cudaSuccess) return;

  std::mt19937_64 random(std::stoull(setting("PYDISTILL_SIMT_SEED", "1")));
  const Order by = order();
  now.grid = grid;
  now.block = block;
  now.body = &body;
#if defined(SIMT_THREAD_SANITIZER)
  now.scheduler_fiber = __tsan_get_current_fiber();
#endif
  std::vector<uint64_t> turn(blocks);
  for (uint64_t i = 0; i < blocks; ++i) turn[i] = by == Order::reverse ? blocks - 1 - i : i;
  if (by == Order::random) std::shuffle(turn.begin(), turn.end(), random);
  for (const uint64_t i : turn) {
    now.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                 static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
    run_block(random, by, shared_bytes);
  }
  acquire(now.at_end);
}

void barrier(const char* site) {
  Thread& self = *now.running;
  release(now.at_barrier);
  self.site = site;
  self.state = State::at_barrier;
  to_scheduler();
  acquire(now.at_barrier);
}

void collective(unsigned mask, const char* name, const void* input, void* output, Combine combine) {
  Thread& self = *now.running;
  if (!(mask >> self.position.lane & 1)) fail(std::string(name) + ": the calling lane is not in its mask");
  self.site = name;
  self.mask = mask;
  self.input = input;
  self.output = output;
  self.state = State::in_collective;
  const void* inputs[32] = {};
  void* outputs[32] = {};
  const int first = self.index - self.position.lane, count = static_cast<int>(now.threads.size());
  bool complete = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= count || now.threads[first + l].state == State::done)
      fail(std::string(name) + ": the mask names a lane that has ended or does not exist");
    const Thread& lane = now.threads[first + l];
    if (lane.state != State::in_collective) {
      complete = false;
      continue;
    }
    if (lane.mask != mask || std::strcmp(lane.site, name) != 0)
      fail(std::string(name) + ": lanes disagree on the mask or the operation");
    inputs[l] = lane.input;
    outputs[l] = lane.output;
  }
  if (!complete) return to_scheduler();
  combine(mask, inputs, outputs);
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) now.threads[first + l].state = State::ready;
}

void sync_warp(unsigned mask) {
  char& warp = now.in_warp[now.running->index / 32];
  release(warp);
  collective(mask, "__syncwarp", nullptr, nullptr, [](unsigned, const void* const*, void* const*) {});
  acquire(warp);
}

void exchange_rows(unsigned (&out)[4], const uint16_t (&row)[8], bool transposed) {
  struct Row {
    uint16_t element[8];
    bool transposed;
  } input;
  std::copy(std::begin(row), std::end(row), input.element);
  input.transposed = transposed;
  collective(0xffffffffu, transposed ? "ldmatrix.trans" : "ldmatrix", &input, &out,
             [](unsigned, const void* const* in, void* const* result) {
               for (int l = 0; l < 32; ++l)
                 for (int m = 0; m < 4; ++m) {
                   const auto element = [&](int r, int k) -> unsigned {
                     const Row& from =
                         *static_cast<const Row*>(in[8 * m + (static_cast<const Row*>(in[l])->transposed ? k : r)]);
                     return from.element[from.transposed ? r : k];
                   };
                   static_cast<unsigned*>(result[l])[m] = element(l / 4, l % 4 * 2) | element(l / 4, l % 4 * 2 + 1)
                                                                                          << 16;
                 }
             });
}

void copy_async(void* to, const void* from, size_t bytes, size_t given) {
  Thread& self = *now.running;
  if (self.copies.size() == most_copies) fail("a thread has more asynchronous copies on their way than there is room");
  // Nobody's until it is waited for.
  std::memset(to, 0xff, bytes);
  self.copies.push_back({to, from, bytes, given});
}

void commit_copies() {
  Thread& self = *now.running;
  self.groups.push_back(self.copies.size() - self.committed);
  self.committed = self.copies.size();
}

void wait_copies(int groups_left) {
  Thread& self = *now.running;
  const size_t done = self.groups.size() - std::min(self.groups.size(), static_cast<size_t>(groups_left));
  size_t landed = 0;
  for (size_t i = 0; i < done; ++i) landed += self.groups[i];
  for (size_t i = 0; i < landed; ++i) {
    const Copy& copy = self.copies[i];
    std::memcpy(copy.to, copy.from, copy.given);
    std::memset(static_cast<char*>(copy.to) + copy.given, 0, copy.bytes - copy.given);
  }
  self.groups.erase(self.groups.begin(), self.groups.begin() + static_cast<std::ptrdiff_t>(done));
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(landed));
  self.committed -= landed;
}

}  // namespace simt

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = simt::most_shared();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > simt::most_shared())
    return cudaErrorInvalidValue;
  simt::asked[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
}
