#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_2_3_8 = launchers<2, 3, 8>();
}  // namespace mgvq
