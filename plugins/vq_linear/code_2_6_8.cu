#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_2_6_8 = launchers<2, 6, 8>();
}  // namespace mgvq
