#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_2_4_8 = launchers<2, 4, 8>();
}  // namespace mgvq
