// Standard normal numbers of many seeds at once, in threads of their own and without Python's lock.
//
// The numbers are numpy's: its ziggurat (`fill`, a function of its library) takes its random words from the generator
// below, Philox4x64 in ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), with key
// (seed, stream) and a counter from 1 on. A word of 64 bits gives two of 32, the lower half first.

#include <stddef.h>
#include <stdint.h>

#include <thread>
#include <vector>

namespace {

struct Philox {
    uint64_t seed, stream, count = 0;  // no draw comes near 2^64 blocks, so the counter's other words stay 0
    uint64_t words[4];
    int used = 4;
    bool half = false;
    uint32_t rest = 0;

    void block() {
        uint64_t a = ++count, b = 0, c = 0, d = 0, key = seed, other = stream;
        for (int round = 0; round < 10; ++round) {
            unsigned __int128 left = (unsigned __int128)0xD2E7470EE14C6C93u * a;
            unsigned __int128 right = (unsigned __int128)0xCA5A826395121157u * c;
            a = (uint64_t)(right >> 64) ^ b ^ key;
            c = (uint64_t)(left >> 64) ^ d ^ other;
            b = (uint64_t)right;
            d = (uint64_t)left;
            key += 0x9E3779B97F4A7C15u;
            other += 0xBB67AE8584CAA73Bu;
        }
        words[0] = a, words[1] = b, words[2] = c, words[3] = d;
        used = 0;
    }
};

uint64_t word64(void *state) {
    Philox &of = *static_cast<Philox *>(state);
    if (of.used == 4) of.block();
    return of.words[of.used++];
}

uint32_t word32(void *state) {
    Philox &of = *static_cast<Philox *>(state);
    if (of.half) {
        of.half = false;
        return of.rest;
    }
    uint64_t word = word64(state);
    of.half = true;
    of.rest = (uint32_t)(word >> 32);
    return (uint32_t)word;
}

double real(void *state) { return (double)(word64(state) >> 11) * (1.0 / 9007199254740992.0); }

// What numpy's functions draw from; its layout is public, in numpy/random/bitgen.h.
struct Generator {
    void *state;
    uint64_t (*next_uint64)(void *);
    uint32_t (*next_uint32)(void *);
    double (*next_double)(void *);
    uint64_t (*next_raw)(void *);
};

}  // namespace

// out: [rows, size], a row of the stream of each seed.
extern "C" void normals(void (*fill)(Generator *, ptrdiff_t, float *), const uint64_t *seeds, uint64_t stream, long rows,
                        long size, float *out, int threads) {
    auto share = [=](long first) {
        for (long row = first; row < rows; row += threads) {
            Philox philox;
            philox.seed = seeds[row];
            philox.stream = stream;
            Generator generator{&philox, word64, word32, real, word64};
            fill(&generator, size, out + row * size);
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(share, (long)thread);
    share(0);
    for (std::thread &other : others) other.join();
}
