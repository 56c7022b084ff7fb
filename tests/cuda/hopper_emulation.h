// csrc/cuda/hopper.cuh in plain C++, beside emulation.h. Boxes arrive at once or as late as allowed, when somebody waits for
// them; products of a warpgroup are computed when they are started or as late as allowed, when they are waited for. What the
// copy engine writes and the tensor cores read is written from NVIDIA's PTX ISA manual ("Tensor-map", "Swizzling modes",
// "Asynchronous warpgroup-level matrix instructions: shared memory matrix layout"), not from the kernels.
#pragma once

#define FASTLM_SM90A 1
#define FASTLM_HAS_SM90A 1

namespace fastlm::cuda {

// --- tensor maps ------------------------------------------------------------------------------------------------------
struct alignas(64) TensorMap {
  const char* data;
  int64_t sizes[4], strides[3];
  int rows;
};

inline bool make_tensor_map(TensorMap* map, const void* data, bool, const int64_t (&sizes)[4], const int64_t (&strides)[3], int rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || rows > 256) return false;
  *map = {static_cast<const char*>(data), {sizes[0], sizes[1], sizes[2], sizes[3]}, {strides[0], strides[1], strides[2]}, rows};
  for (int64_t stride : strides) {
    if (2 * stride % 16 != 0 || stride <= 0) return false;
  }
  return true;
}

// --- shared memory ----------------------------------------------------------------------------------------------------
inline char* tile_memory() { return emulation::machine.shared; }

// --- barriers in shared memory ----------------------------------------------------------------------------------------
struct alignas(8) TileBarrier {
  int count, left, bytes;
  unsigned phases;
};

namespace emulation {

struct Box {
  TileBarrier* barrier;
  char* to;
  const TensorMap* map;
  int64_t at[4];  // batch, head, row, column
};
inline std::vector<Box> boxes;  // under way

inline void settle(TileBarrier* b) {
  if (b->left != 0 || b->bytes != 0) return;
  b->left = b->count;
  ++b->phases;
  machine.progress = true;
}

inline void deliver(const Box& box) {
  const TensorMap& map = *box.map;
  for (int r = 0; r < map.rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const int64_t at[4] = {box.at[0], box.at[1], box.at[2] + r, box.at[3] + c};
      bool inside = true;
      int64_t offset = at[3];
      for (int d = 0; d < 4; ++d) inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
      for (int d = 0; d < 3; ++d) offset += at[d] * map.strides[d];
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map.data + 2 * offset, 2);
      size_t to = size_t(box.to - machine.shared) + 128 * r + 2 * c;
      std::memcpy(machine.shared + (to ^ ((to >> 7 & 7) << 4)), &value, 2);
    }
  }
  box.barrier->bytes -= map.rows * 128;
  settle(box.barrier);
}

}  // namespace emulation

inline void barrier_init(TileBarrier* b, int count) { *b = {count, count, 0, 0}; }
inline void barrier_init_done() {}
inline void barrier_arrive(TileBarrier* b) {
  if (b->left == 0) emulation::fail("more arrivals at a barrier than it counts");
  --b->left;
  emulation::machine.progress = true;
  emulation::settle(b);
}
inline void barrier_arrive_expect(TileBarrier* b, int bytes) {
  b->bytes += bytes;
  barrier_arrive(b);
}
inline void barrier_wait(TileBarrier* b, int parity) {
  auto& boxes = emulation::boxes;
  while (int(b->phases & 1) == parity) {
    for (size_t i = 0; i < boxes.size();) {
      if (boxes[i].barrier == b) {
        emulation::Box box = boxes[i];
        boxes.erase(boxes.begin() + i);
        emulation::deliver(box);
      } else {
        ++i;
      }
    }
    if (int(b->phases & 1) == parity) emulation::yield();
  }
}

// --- the copy engine --------------------------------------------------------------------------------------------------
inline void load_box(void* shared, const TensorMap* map, TileBarrier* b, int column, int row, int head, int batch) {
  using namespace emulation;
  char* to = static_cast<char*>(shared);
  if ((to - machine.shared) % 1024 != 0) fail("a swizzled box must begin at a multiple of 1024 bytes");
  Box box{b, to, map, {batch, head, row, column}};
  if (machine.late_copies) {
    std::memset(to, 0xff, size_t(map->rows) * 128);  // on its way: what was there is lost
    boxes.push_back(box);
  } else {
    deliver(box);
  }
}
inline void fence_async() {}

// --- groups of threads ------------------------------------------------------------------------------------------------
constexpr int kWarpgroup = 128;
template <int kRegisters> void give_registers() {}
template <int kRegisters> void take_registers() {}

namespace emulation {
inline Barrier numbered[16];
}
inline void group_sync(int number, int threads) { emulation::wait(emulation::numbered[number], threads); }
inline void group_arrive(int number, int threads) {
  emulation::Barrier& b = emulation::numbered[number];
  emulation::machine.progress = true;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
  }
}

// --- products of a warpgroup ------------------------------------------------------------------------------------------
struct TileDescriptor {
  const char* at;
  int leading, stride;
  TileDescriptor after(int bytes) const { return {at + bytes, leading, stride}; }
};
inline TileDescriptor tile_descriptor(const void* at, int leading_bytes, int stride_bytes) {
  return {static_cast<const char*>(at), leading_bytes, stride_bytes};
}

namespace emulation {

// A warp's part of a product: 16 of its 64 rows. Warps go on by themselves, so that one may be done with a tile that another
// still reads.
struct Operands {
  float (*acc)[4];
  uint32_t a[4];
};
struct Product {
  Operands operands[kLanes];
  TileDescriptor a, b;
  bool add, from_registers, by_rows;  // by_rows: of b, and of a where that is a tile
  int size;
  float (*widen16)(uint16_t);
};
struct Products {
  Barrier barrier;
  Operands slots[2][kLanes];
  int started[kLanes];
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;  // committed, oldest first
};
inline Products products[32];  // of each warp
inline Products& own_products() { return products[machine.current / kLanes]; }

inline uint16_t swizzled(const char* at) {
  size_t from = size_t(at - machine.shared);
  uint16_t value;
  std::memcpy(&value, machine.shared + (from ^ ((from >> 7 & 7) << 4)), 2);
  return value;
}

inline void compute(const Product& p) {
  static float a[16][16], b[16][256];
  int first = machine.current % kWarpgroup / kLanes * 16;
  for (int k = 0; k < 16; ++k) {
    for (int r = 0; r < 16; ++r) {
      int row = first + r;
      if (p.from_registers) {  // as for mma.m16n8k16
        a[r][k] = p.widen16(uint16_t(p.operands[r % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + r / 8] >> 16 * (k % 2)));
      } else if (p.by_rows) {
        a[r][k] = p.widen16(swizzled(p.a.at + k / 8 * p.a.stride + k % 8 * 128 + row * 2));
      } else {
        a[r][k] = p.widen16(swizzled(p.a.at + row / 8 * p.a.stride + row % 8 * 128 + 2 * k));
      }
    }
    for (int n = 0; n < 8 * p.size; ++n) {
      b[k][n] = p.widen16(p.by_rows
                              ? swizzled(p.b.at + n / 64 * p.b.leading + k / 8 * p.b.stride + k % 8 * 128 + n % 64 * 2)
                              : swizzled(p.b.at + n / 8 * p.b.stride + n % 8 * 128 + 2 * k));
    }
  }
  for (int t = 0; t < kLanes; ++t) {
    for (int i = 0; i < 4 * p.size; ++i) {
      int e = i % 4, row = t / 4 + e / 2 * 8, col = i / 4 * 8 + t % 4 * 2 + e % 2;
      float sum = p.add ? p.operands[t].acc[i / 4][e] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      p.operands[t].acc[i / 4][e] = sum;
    }
  }
}

inline const bool registered = [] {
  machine.begin_block = [] {
    if (!boxes.empty()) fail("a block ended with boxes under way");
    for (Products& p : products) {
      if (!p.open.empty() || !p.groups.empty()) fail("a block ended with products under way");
      p.barrier = {};
      std::fill(std::begin(p.started), std::end(p.started), 0);
    }
    for (Barrier& b : numbered) b = {};
  };
  return true;
}();

template <class T> float widen_bits(uint16_t bits) { return widen(T{bits}); }

template <class T>
void start(float (*acc)[4], int size, const uint32_t* a_registers, TileDescriptor a, TileDescriptor b, bool add, bool by_rows) {
  Products& w = own_products();
  auto& slots = w.slots[w.started[lane()]++ % 2];
  Operands& mine = slots[lane()];
  mine.acc = acc;
  for (int i = 0; i < 4; ++i) mine.a[i] = a_registers != nullptr ? a_registers[i] : 0;
  wait(w.barrier, kLanes);
  if (lane() != 0) return;
  Product p{{}, a, b, add, a_registers != nullptr, by_rows, size, widen_bits<T>};
  std::memcpy(p.operands, slots, sizeof slots);
  machine.late_copies ? w.open.push_back(p) : compute(p);
}

}  // namespace emulation

inline void wgmma_fence() {}
inline void wgmma_commit() {
  using namespace emulation;
  Products& w = own_products();
  if (lane() != 0) return;
  w.groups.push_back(std::move(w.open));
  w.open.clear();
}
inline void add_two(float* to, float first, float second) { to[0] += first, to[1] += second; }
template <int kPending> void wgmma_wait() {
  using namespace emulation;
  Products& w = own_products();
  wait(w.barrier, kLanes);
  if (lane() == 0) {
    while (int(w.groups.size()) > kPending) {
      for (const Product& p : w.groups.front()) compute(p);
      w.groups.erase(w.groups.begin());
    }
  }
  wait(w.barrier, kLanes);
}
template <int kSize> void pin(float (&)[kSize][4]) {}
inline void keep_order() {}

template <class T, int kSize, bool kAdd> void wgmma_shared(float (&c)[kSize][4], TileDescriptor a, TileDescriptor b) {
  emulation::start<T>(c, kSize, nullptr, a, b, kAdd, false);
}
template <class T, bool kAdd> void wgmma_rows(float (&c)[8][4], TileDescriptor a, TileDescriptor b) {
  emulation::start<T>(c, 8, nullptr, a, b, kAdd, true);
}
template <class T, int kSize>
void wgmma_registers(float (&c)[kSize][4], const uint32_t (&a)[4], TileDescriptor b) {
  emulation::start<T>(c, kSize, a, {}, b, true, true);
}

}  // namespace fastlm::cuda
