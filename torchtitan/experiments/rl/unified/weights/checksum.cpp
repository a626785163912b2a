// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// Checksum of a range of memory, and the same while it is copied: at the speed of memory, where a cryptographic hash
// would take many times longer than the copy.
//
// The range is cut into blocks of kBlock bytes that threads share. Eight lanes of 64-bit words run over a block, each
// with the sum of its words and the sum of those sums (Fletcher, "An arithmetic checksum for serial transmissions",
// 1982), so that order counts as well. SplitMix64's finalizer (Steele et al., 2014) chains lanes and blocks.
// checksum.py takes the same sums on a GPU.

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 1 << 20;
constexpr int64_t kLine = 64;
constexpr int kWords = kLine / 8;

// Half a line: the widest that both AVX2 and AVX-512 keep in registers. The second type may lie anywhere.
typedef uint64_t Lanes __attribute__((vector_size(kLine / 2)));
typedef uint64_t LanesInMemory __attribute__((vector_size(kLine / 2), aligned(1), may_alias));

uint64_t mix(uint64_t z) {
  z += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

struct Sums {
  Lanes sum[2] = {}, sums[2] = {};

  void add(int half, Lanes words) {
    sum[half] += words;
    sums[half] += sum[half];
  }
};

// Past the caches: what is written here is read much later, and a line need not be fetched to be overwritten.
void stream(char* to, Lanes words) {
#ifdef __AVX2__
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(words));
#else
  *reinterpret_cast<LanesInMemory*>(to) = words;
#endif
}

int64_t block_size(int64_t size, int64_t block) {
  const int64_t rest = size - block * kBlock;
  return rest < kBlock ? rest : kBlock;
}

template <bool kCopy, bool kStream>
Sums block(char* to, const char* from, int64_t size) {
  Sums sums;
  int64_t i = 0;
  for (; i + kLine <= size; i += kLine) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * (kLine / 2);
      const Lanes words = *reinterpret_cast<const LanesInMemory*>(from + at);
      sums.add(half, words);
      if (kStream) {
        stream(to + at, words);
      } else if (kCopy) {
        *reinterpret_cast<LanesInMemory*>(to + at) = words;
      }
    }
  }
  if (i < size) {
    Lanes rest[2] = {};
    std::memcpy(rest, from + i, size - i);
    if (kCopy) std::memcpy(to + i, from + i, size - i);
    for (int half = 0; half < 2; ++half) sums.add(half, rest[half]);
  }
  return sums;
}

}  // namespace

// The checksum of a range of `size` bytes: `sums` has, for each of its blocks, the sums of the lanes' words and then the
// sums of those sums.
extern "C" uint64_t checksum_of_sums(const uint64_t* sums, int64_t size) {
  uint64_t of_range = 0;
  for (int64_t b = 0; b * kBlock < size; ++b, sums += 2 * kWords) {
    uint64_t h = mix(block_size(size, b));
    for (int lane = 0; lane < kWords; ++lane) h = mix(mix(h ^ sums[lane]) ^ sums[kWords + lane]);
    of_range = mix(of_range ^ h);
  }
  return of_range;
}

// Checksum of `size` bytes at `from`, copied to `to` unless that is null; by `threads` threads, whose number does not
// enter the result.
extern "C" uint64_t copy_checksum(char* to, const char* from, int64_t size, int threads) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  std::vector<Sums> sums(blocks);
  const bool aligned = reinterpret_cast<uintptr_t>(to) % kLine == 0;
#pragma omp parallel for num_threads(threads) if (blocks > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * kBlock, length = block_size(size, b);
    if (to == nullptr) {
      sums[b] = block<false, false>(nullptr, from + begin, length);
    } else if (aligned) {
      sums[b] = block<true, true>(to + begin, from + begin, length);
    } else {
      sums[b] = block<true, false>(to + begin, from + begin, length);
    }
#ifdef __AVX2__
    _mm_sfence();
#endif
  }
  static_assert(sizeof(Sums) == 2 * kWords * sizeof(uint64_t), "checksum_of_sums reads them one after the other");
  return checksum_of_sums(reinterpret_cast<const uint64_t*>(sums.data()), size);
}
