#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_2_8_8 = launchers<2, 8, 8>();
}  // namespace mgvq
