--- Weighted round robin.
--
-- Equal weights: one after the other. Else a cursor that advances by the golden ratio over the
-- line of cumulated weights, which lie in the records: each peer gets its share, well spread, in
-- O(1) per pick and with no schedule to build. Each worker starts at random, and the cursor goes on
-- over versions, after the peer that had the last turn, so that no peer is favoured by many workers
-- or many changes.

local codec = require "tidegate.codec"
local weights = require "tidegate.pickers.weights"

local at = weights.at
local floor = math.floor
local id_of = codec.id
local random = math.random
local setmetatable = setmetatable

local GOLDEN = 0.6180339887498949

local _M = {}
local uniform = { search = weights.search }
local weighted = { search = weights.search }
uniform.__index = uniform
weighted.__index = weighted


function uniform:next()
    local cursor = self.cursor + 1
    if cursor >= self.stop then
        cursor = self.first
    end
    self.cursor = cursor
    return cursor
end


function weighted:next()
    local position = self.position + GOLDEN
    if position >= 1 then
        position = position - 1
    end
    self.position = position
    return at(self.view, position)
end


-- Place of the last peer whose id is not above `id`; the peers are sorted by it.
local function place_of(view, id)
    local low, high = 0, view.count
    while low < high do
        local middle = floor((low + high) / 2)
        if id_of(view.blob, view.head.count, view.first + middle) <= id then
            low = middle + 1
        else
            high = middle
        end
    end
    return view.first + low - 1
end


--- Picker for `view`; see `tidegate.pickers`.
function _M.new(view, previous)
    local cursor
    if previous and previous.cursor >= previous.first then
        local before = previous.view
        cursor = place_of(view, id_of(before.blob, before.head.count, previous.cursor))
    else
        cursor = view.first + random(0, view.count - 1)
    end
    return setmetatable({
        view = view,
        first = view.first,
        stop = view.first + view.count,
        cursor = cursor,
        position = previous and previous.position or random(),
    }, view.uniform and uniform or weighted)
end


return _M
