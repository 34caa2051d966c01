// Large tensors of a CPU, out of one region that keeps what is freed for the next of them.
//
// A tensor of some MiB is memory of its own to the C library: new pages, each a fault and full of zeros, for every
// tensor. Told to keep what is freed (mallopt), glibc leaves holes that a tensor of the same size does not fit in: for
// torch's alignment it asks for some bytes more than it then uses, and small objects come to lie in what is left over.
//
// Here a tensor takes the smallest gap that it fits in, the lowest of these; neighbouring gaps are one. Pages are first
// used when a tensor comes to lie there, and stay with the process.

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace {

constexpr size_t LARGE = 128 << 10;  // bytes from which on a tensor counts
constexpr size_t PAGE = 4096;        // no two tensors share one

class Region {
  public:
    Region(char *begin, size_t size) : begin_(begin), end_(begin + size) { open(begin, size); }

    bool holds(const void *at) const { return begin_ <= at && at < end_; }

    // nullptr where no gap is large enough.
    void *take(size_t size) {
        std::lock_guard<std::mutex> guard(lock);
        auto fit = sizes_.lower_bound({size, nullptr});
        if (fit == sizes_.end()) return nullptr;
        auto [room, at] = *fit;
        close(at, room);
        if (room > size) open(at + size, room - size);
        taken_[at] = size;
        return at;
    }

    void give(void *address) {
        std::lock_guard<std::mutex> guard(lock);
        char *at = (char *)address;
        size_t size = taken_.at(at);
        taken_.erase(at);
        auto next = gaps_.find(at + size);
        if (next != gaps_.end()) {
            size += next->second;
            close(next->first, next->second);
        }
        auto before = gaps_.lower_bound(at);
        if (before != gaps_.begin() && (--before)->first + before->second == at) {
            at = before->first;
            size += before->second;
            close(before->first, before->second);
        }
        open(at, size);
    }

    std::mutex lock;

  private:
    void open(char *at, size_t size) {
        gaps_[at] = size;
        sizes_.insert({size, at});
    }
    void close(char *at, size_t size) {
        sizes_.erase({size, at});
        gaps_.erase(at);
    }

    char *begin_, *end_;
    std::map<char *, size_t> gaps_, taken_;
    std::set<std::pair<size_t, char *>> sizes_;  // of the gaps
};

Region *region;  // never destroyed: tensors may outlive everything

void give(void *at) {
    if (region->holds(at)) region->give(at);
    else c10::free_cpu(at);
}

class Allocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t size) override {
        void *at = size < LARGE ? nullptr : region->take((size + PAGE - 1) / PAGE * PAGE);
        if (!at) at = c10::alloc_cpu(size);
        return {at, at, &give, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give; }
    void copy_data(void *to, const void *from, size_t size) const override { memcpy(to, from, size); }
};

}  // namespace

extern "C" {

// From now on, for the process; 0 where the system does not give the addresses: as many as it has memory.
int keep(void) {
    if (region) return 1;
    size_t size = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *begin = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (begin == MAP_FAILED) return 0;
    region = new Region((char *)begin, size);
    // A child of fork() has the thread that forked only: another one must not hold the lock then.
    pthread_atfork([] { region->lock.lock(); }, [] { region->lock.unlock(); }, [] { region->lock.unlock(); });
    c10::SetCPUAllocator(new Allocator, 1);
    return 1;
}
}
