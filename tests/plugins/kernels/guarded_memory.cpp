#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "placed_memory.h"

namespace {

class GuardedMemory final : public PlacedMemory {
 public:
  explicit GuardedMemory(bool is_at_end)
      : is_at_end_(is_at_end), page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {}
  ~GuardedMemory() override { clear(); }

  void* put(const void* from, std::size_t bytes, std::size_t alignment) override {
    const std::size_t inside = (bytes + page_ - 1) / page_ * page_ + (bytes ? 0 : page_), all = inside + 2 * page_;
    void* const block = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* const first = static_cast<char*>(block) + page_;
    if (block == MAP_FAILED || mprotect(first, inside, PROT_READ | PROT_WRITE)) {
      std::perror("memory between guarded pages");
      std::exit(1);
    }
    blocks_.push_back({block, all});
    char* const place = is_at_end_ ? first + (inside - bytes) / alignment * alignment : first;
    if (bytes) std::memcpy(place, from, bytes);
    return place;
  }
  void get(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void clear() override {
    for (const Block& block : blocks_) munmap(block.data, block.bytes);
    blocks_.clear();
  }

 private:
  struct Block {
    void* data;
    std::size_t bytes;
  };
  bool is_at_end_;
  std::size_t page_;
  std::vector<Block> blocks_;
};

}  // namespace

std::unique_ptr<PlacedMemory> guarded_memory(bool is_at_end) { return std::make_unique<GuardedMemory>(is_at_end); }
