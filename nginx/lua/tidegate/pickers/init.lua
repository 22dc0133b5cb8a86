--- The balancing algorithms, by the name that a policy gives.
--
-- A picker is made per worker and version of an upstream: `new(view, previous)` with
-- `view = {policy, peers, count, uniform, total_weight}` (the admitted peers, index from 0) and the
-- picker of the version before, if any. `picker:next()` gives the index of the next peer. It must
-- be O(log n) at most and must not yield.

local round_robin = require "tidegate.pickers.round_robin"

local registry = { round_robin = round_robin }

local _M = {}


--- Whether `algorithm` is one of ours.
function _M.has(algorithm)
    return registry[algorithm] ~= nil
end


--- Picker for `view`, by round robin where the algorithm is not known.
function _M.new(algorithm, view, previous)
    return (registry[algorithm] or round_robin).new(view, previous)
end


return _M
