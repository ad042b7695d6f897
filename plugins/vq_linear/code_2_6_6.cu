#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_2_6_6 = launchers<2, 6, 6>();
}  // namespace mgvq
