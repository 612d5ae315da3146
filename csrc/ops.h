// The ops for a device's tensors, to be registered under its dispatch key.
#pragma once

#include <torch/library.h>

namespace qlora {

void register_ops(torch::Library& m);

}  // namespace qlora
