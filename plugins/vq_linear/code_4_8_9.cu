#include "vq_linear/launchers.cuh"

namespace mgvq {
const CodeLaunchers launchers_4_8_9 = launchers<4, 8, 9>();
}  // namespace mgvq
