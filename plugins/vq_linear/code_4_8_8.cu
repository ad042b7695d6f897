#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_4_8_8 = launchers<4, 8, 8>();
}  // namespace mgvq
