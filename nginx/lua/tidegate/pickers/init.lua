--- The balancing algorithms, by the name that a policy gives.
--
-- A picker is made per worker and version of an upstream: `new(view, previous)` with the peers to
-- pick from and the picker of the version before, if that was of the same algorithm. A view is
-- `{policy, blob, head, peers, first, count, uniform, total_weight, cell}`: the peers are those
-- from index `first` on, `count` of them and at least one, whose `cumulative` goes up to
-- `total_weight`; `cell` counts the requests in flight of the whole upstream (`tidegate.load`), 0
-- where nobody asks.
--
-- `picker:next()` gives the index of the next peer; `picker:search(ok, context)` gives the next one
-- for which `ok(context, index)` holds, nil if there is none. Both are O(log n) at most as long as
-- most peers are fine, and must not yield.

local registry = {
    ewma = require "tidegate.pickers.ewma",
    first = require "tidegate.pickers.first",
    hash = require "tidegate.pickers.hash",
    least_conn = require "tidegate.pickers.least_conn",
    random = require "tidegate.pickers.random",
    round_robin = require "tidegate.pickers.round_robin",
}

local _M = {}


--- Whether `algorithm` is one of ours.
function _M.has(algorithm)
    return registry[algorithm] ~= nil
end


--- Picker for `view`, by round robin where the algorithm is not known.
function _M.new(view, previous)
    local algorithm = registry[view.policy.algorithm] and view.policy.algorithm or "round_robin"
    local picker = registry[algorithm].new(
        view, previous and previous.algorithm == algorithm and previous or nil)
    picker.algorithm = algorithm
    return picker
end


return _M
