// What a manifest may hold; as the dataclasses of edgelm/bundle.
#pragma once

#include "capi/bundle/schema.h"

namespace edgelm::capi {

const Schema& manifest_schema();

}  // namespace edgelm::capi
