#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_2_8_9 = launchers<2, 8, 9>();
}  // namespace mgvq
