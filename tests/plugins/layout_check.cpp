// layout.h: device order is a permutation of the codes' bytes, and every weight's window has a place of its own.
#include "vq_linear/layout.h"

#include <set>
#include <tuple>
#include <vector>

#include "check.h"

using mgvq::Code;

namespace {

void every_byte_of_a_unit_belongs_to_one_lane(const Code& code) {
  std::vector<int> owners(code.unit_bytes(), 0);
  for (int lane = 0; lane < mgvq::kLanes; ++lane)
    for (int byte = 0; byte < code.lane_bytes(); ++byte) {
      const int place = mgvq::byte_in_unit(code, lane, byte);
      EXPECT(place >= 0 && place < code.unit_bytes(), "code %d,%d,%d lane %d byte %d at %d", code.vector, code.shift,
             code.window, lane, byte, place);
      if (place >= 0 && place < code.unit_bytes()) ++owners[place];
    }
  int once = 0;
  for (int count : owners) once += count == 1;
  EXPECT(once == code.unit_bytes(), "code %d,%d,%d: %d of %d bytes", code.vector, code.shift, code.window, once,
         code.unit_bytes());
}

// V weights share a window, and nothing else does; units, lanes, chunks and windows stay inside their counts.
void every_window_belongs_to_neighbouring_columns(const Code& code, int64_t rows, int64_t columns) {
  std::set<std::tuple<int64_t, int, int, int, int>> seen;
  const int64_t units = mgvq::codes_bytes(code, rows, columns) / code.unit_bytes();
  bool inside = true;
  for (int64_t row = 0; row < mgvq::padded(rows, mgvq::kRowGroup); ++row)
    for (int64_t column = 0; column < mgvq::padded(columns, mgvq::kColumnGroup); ++column) {
      const mgvq::Place at = mgvq::place_of(code, row, column, columns);
      inside = inside && at.unit < units && at.lane < mgvq::kLanes && at.chunk < code.lane_chunks() &&
               at.window < mgvq::kChunkRows && at.value == column % code.vector;
      seen.emplace(at.unit, at.lane, at.chunk, at.window, at.value);
    }
  const auto weights = units * mgvq::kRowGroup * mgvq::kColumnGroup;
  EXPECT(inside, "code %d,%d,%d of %lldx%lld", code.vector, code.shift, code.window, (long long)rows,
         (long long)columns);
  EXPECT((int64_t)seen.size() == weights, "code %d,%d,%d: %lld places for %lld weights", code.vector, code.shift,
         code.window, (long long)seen.size(), (long long)weights);
}

// A lane's chunks are the A fragment of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): rows g and g + 8 of
// each tile of 16 rows, columns 2q, 2q+1 and 2q+8, 2q+9.
void a_lane_holds_its_own_fragment(const Code& code) {
  for (int64_t row = 0; row < mgvq::kRowGroup; ++row)
    for (int64_t column = 0; column < mgvq::kColumnGroup; ++column) {
      const mgvq::Place at = mgvq::place_of(code, row, column, mgvq::kColumnGroup);
      EXPECT(at.lane / 4 == row % 8, "row %lld in lane %d", (long long)row, at.lane);
      EXPECT(at.window == row / 8, "row %lld in window %d", (long long)row, at.window);
      const int quarter = code.vector == 2 ? (int)(column % 8 / 2) : (int)(column / 4);
      EXPECT(at.lane % 4 == quarter, "column %lld in lane %d", (long long)column, at.lane);
      EXPECT(at.chunk == (code.vector == 2 ? (int)(column / 8) : 0), "column %lld in chunk %d", (long long)column,
             at.chunk);
    }
}

}  // namespace

int main() {
  for (const Code& code : mgvq::kCodes) {
    EXPECT(code.table_bytes() == 4 * code.entries(), "code %d,%d,%d", code.vector, code.shift, code.window);
    EXPECT(code.unit_bytes() * 8 * code.vector == mgvq::kRowGroup * mgvq::kColumnGroup * code.shift,
           "code %d,%d,%d: k/V bits a weight", code.vector, code.shift, code.window);
    EXPECT(mgvq::is_known(code), "its own list");
    every_byte_of_a_unit_belongs_to_one_lane(code);
    every_window_belongs_to_neighbouring_columns(code, 130, 33);
    a_lane_holds_its_own_fragment(code);
  }
  EXPECT(!mgvq::is_known({4, 8, 7}) && !mgvq::is_known({2, 4, 9}), "codes without kernels");
  return report();
}
