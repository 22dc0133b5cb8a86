--- Places on the line of cumulated weights, and a search that most pickers share.
--
-- The records have the line already; a guide table over it, one entry per peer, makes finding a
-- place O(1) on average. It is made when it is first needed.

local ffi = require "ffi"

local ffi_new = ffi.new
local floor = math.floor
local min = math.min
local random = math.random

local TRIES = 16

local guide_type = ffi.typeof("uint32_t[?]")

local _M = {}


local function guide_of(view)
    local peers, first, count = view.peers, view.first, view.count
    local guide, index = ffi_new(guide_type, count + 1), 0
    for step = 0, count - 1 do
        local target = step * view.total_weight / count
        while peers[first + index].cumulative <= target do
            index = index + 1
        end
        guide[step] = index
    end
    guide[count] = count - 1
    view.guide = guide
    return guide
end


--- Index of the peer at `position` (0 to below 1) of the weights of `view`.
function _M.at(view, position)
    local peers, first, count = view.peers, view.first, view.count
    if view.uniform then
        return first + floor(position * count)
    end
    local guide = view.guide or guide_of(view)
    local target, step = position * view.total_weight, floor(position * count)
    local low, high = guide[step], guide[step + 1]
    while low < high do
        local middle = floor((low + high) / 2)
        if peers[first + middle].cumulative > target then
            high = middle
        else
            low = middle + 1
        end
    end
    return first + low
end


--- The next one of `picker` that is fine; some in its order, then any, from a random one on.
function _M.search(picker, ok, context)
    local first, count = picker.view.first, picker.view.count
    for _ = 1, min(count, TRIES) do
        local index = picker:next()
        if ok(context, index) then
            return index
        end
    end
    local start = random(0, count - 1)
    for step = 0, count - 1 do
        local index = first + (start + step) % count
        if ok(context, index) then
            return index
        end
    end
    return nil
end


return _M
