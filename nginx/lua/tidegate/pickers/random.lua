--- A peer at random, by weight.

local weights = require "tidegate.pickers.weights"

local at = weights.at
local random = math.random
local setmetatable = setmetatable

local _M = {}
local class = { search = weights.search }
class.__index = class


function class:next()
    return at(self.view, random())
end


--- Picker for `view`; see `tidegate.pickers`.
function _M.new(view)
    return setmetatable({ view = view }, class)
end


return _M
