#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_2_5_8 = launchers<2, 5, 8>();
}  // namespace mgvq
